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
    entropy: Tensor
    """Of the policy at its temperature; without gradient unless that is wanted."""
    values: Tensor
    """Of the state before each token."""
    last_values: Tensor
    """`[completions]`, of the state after the last token."""


class ActorCritic(nn.Module):
    """The policy, and a value model or a value head on the policy's last hidden states."""

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: PreTrainedModel | None,
        value_mean: float = 0.0,
        value_std: float = 1.0,
    ):
        """`value_mean` and `value_std` are taken from the value model's outputs, where the rewards are scaled so."""
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.value_mean, self.value_std = value_mean, value_std
        if value_model is None:
            width = policy.config.get_text_config().hidden_size
            self.value_head = nn.Linear(width, 1, dtype=torch.float32, device=policy.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def models(self) -> list[PreTrainedModel]:
        return [model for model in (self.policy, self.value_model) if model is not None]

    def forward(
        self, batch: Batch, temperature: float, policy_learns: bool = True, entropy_gradient: bool = False
    ) -> Scored:
        """What both say of the completions; a policy that does not learn gets no gradient from the values."""
        hidden = last_hidden(self.policy, batch.layout)
        scores = score_tokens(
            bare(self.policy), hidden[batch.before], batch.targets, True, temperature, entropy_gradient
        )
        places = torch.cat([batch.before, batch.last])
        if self.value_model is None:
            states = hidden[places] if policy_learns else hidden[places].detach()
            with torch.autocast(hidden.device.type, enabled=False):  # 16 bits are too coarse for values
                values = self.value_head(states.float())
        else:
            values = bare(self.value_model).score(last_hidden(self.value_model, batch.layout)[places]).float()
            values = (values - self.value_mean) / self.value_std
        before, last = values.squeeze(-1).split([len(batch.before), len(batch.last)])
        return Scored(scores.logps, scores.entropy, before, last)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        for model in self.models:
            model.gradient_checkpointing_enable(*args, **kwargs)


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
