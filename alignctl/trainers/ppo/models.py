"""The policy with its value model, and what both say of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignctl.engine.forward import bare, last_hidden, takes_packed_rows
from alignctl.engine.head import score_tokens
from alignctl.engine.layout import Layout, pack, pad


class Batch(NamedTuple):
    """Prompts with their completions as one forward pass; tensors are of all completions' tokens, one after another."""

    layout: Layout
    before: Tensor
    """`[tokens]`, of each token the position in the layout that predicts it."""
    last: Tensor
    """`[completions]`, the position of the last token of each."""
    targets: Tensor
    """`[tokens]`"""


class Scored(NamedTuple):
    """What is said of completions, `[tokens]` each but for the last."""

    logps: Tensor
    entropy: Tensor | None
    """Of the policy at its temperature; None in a pass with gradients where nobody asks for it."""
    values: Tensor
    """Of the state before each token."""
    last_values: Tensor
    """`[completions]`, of the state after the last token."""

    def detach(self) -> Scored:
        return Scored(*(one if one is None else one.detach() for one in self))


class ValueHead(nn.Linear):
    """One number for a hidden state, 0 at first, in float32: 16 bits are too coarse for values."""

    def __init__(self, width: int, device: torch.device):
        super().__init__(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


class ActorCritic(nn.Module):
    """The policy, and a value model or a value head on the policy's last hidden states."""

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: nn.Module | None,
        value_mean: float = 0.0,
        value_std: float = 1.0,
    ):
        """`value_mean` and `value_std` are taken from the value model's outputs, where the rewards are scaled so."""
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.value_mean, self.value_std = value_mean, value_std
        if value_model is None:
            self.value_head = ValueHead(policy.config.get_text_config().hidden_size, policy.device)

    @property
    def models(self) -> list[nn.Module]:
        return [model for model in (self.policy, self.value_model) if model is not None]

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """Without those of a value model that is an adapter beside the policy's."""
        others = set(self.value_model.adapter_parameters()) if hasattr(self.value_model, "adapter_parameters") else ()
        return [parameter for parameter in self.policy.parameters() if parameter not in others]

    def forward(
        self,
        batch: Batch,
        temperature: float,
        policy_learns: bool = True,
        entropy_gradient: bool = False,
        entropy: bool = False,
    ) -> Scored:
        """What both say of the completions; a policy that does not learn gets no gradient from the values. `entropy`
        asks for it in a pass with gradients."""
        hidden = last_hidden(self.policy, batch.layout)
        statistics = entropy or entropy_gradient or not torch.is_grad_enabled()
        scores = score_tokens(
            bare(self.policy), hidden[batch.before], batch.targets, statistics, temperature, entropy_gradient
        )
        places = torch.cat([batch.before, batch.last])
        if self.value_model is None:
            values = self.value_head(hidden[places] if policy_learns else hidden[places].detach())
        else:
            values = bare(self.value_model).score(last_hidden(self.value_model, batch.layout)[places]).float()
            values = (values - self.value_mean) / self.value_std
        before, last = values.squeeze(-1).split([len(batch.before), len(batch.last)])
        return Scored(scores.logps, scores.entropy, before, last)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for model in self.models:
            model.activation_checkpointing_enable(**options)


def policy_logps(policy: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities `[tokens]` of the completions under a policy by itself, a reference for instance."""
    hidden = last_hidden(policy, batch.layout)[batch.before]
    return score_tokens(bare(policy), hidden, batch.targets, temperature=temperature).logps


def lay_out(
    models: Sequence[nn.Module],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Prompts with their completions, packed where all models take that."""
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    if all(map(takes_packed_rows, models)):
        layout = pack(rows, [(index,) for index in range(len(rows))], device)
    else:
        layout = pad(rows, pad_id, device)
    spans = [(len(prompt) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    return Batch(
        layout,
        before=torch.cat([layout.where[index, first:end] for index, (first, end) in enumerate(spans)]),
        last=torch.stack([layout.where[index, end] for index, (_, end) in enumerate(spans)]),
        targets=torch.cat([row[first + 1 :] for row, (first, _) in zip(rows, spans, strict=True)]).to(device),
    )
