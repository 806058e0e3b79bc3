"""The policy as it is trained, and what models say of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignctl.engine.forward import bare, last_hidden
from alignctl.engine.head import score_tokens
from alignctl.engine.layout import Layout, pack, pad
from alignctl.rollout.episodes import Episodes


class Batch(NamedTuple):
    """Prompts with their completions as one forward pass; tensors are of all completions' tokens, one after another."""

    layout: Layout
    before: Tensor
    """`[tokens]`, of each token the position in the layout that predicts it."""
    last: Tensor
    """`[completions]`, the position of the last token of each."""
    targets: Tensor
    """`[tokens]`"""


class Outputs(NamedTuple):
    """What is said of completions, `[tokens]` each unless said otherwise."""

    logps: Tensor
    entropy: Tensor | None
    """Of the policy at its temperature; None in a pass with gradients where nobody asks for it."""
    values: Tensor | None = None
    """Of the state before each token; None without a value model."""
    last_values: Tensor | None = None
    """`[completions]`, of the state after the last token."""
    ref_logps: Tensor | None = None
    """Under the reference; None without one, and in a pass of the update."""

    def detach(self) -> Outputs:
        return Outputs(*(one if one is None else one.detach() for one in self))


class PolicyModel(nn.Module):
    """The policy; a subclass adds what learns beside it."""

    def __init__(self, policy: PreTrainedModel):
        super().__init__()
        self.policy = policy

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """All that is given prompts and completions, by the name that people read."""
        return {"model": self.policy}

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())

    def forward(
        self,
        batch: Batch,
        temperature: float,
        policy_learns: bool = True,
        entropy_gradient: bool = False,
        entropy: bool = False,
    ) -> Outputs:
        """What is said of the completions; a policy that does not learn gets no gradient from what learns beside it.
        `entropy` asks for it in a pass with gradients."""
        hidden = last_hidden(self.policy, batch.layout)
        statistics = entropy or entropy_gradient or not torch.is_grad_enabled()
        scores = score_tokens(
            bare(self.policy), hidden[batch.before], batch.targets, statistics, temperature, entropy_gradient
        )
        return Outputs(scores.logps, scores.entropy, *self.values(hidden, batch, policy_learns))

    def values(self, hidden: Tensor, batch: Batch, policy_learns: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of the states before the tokens and after the last ones, as `Outputs` has them; none without a value model.

        Args:
            hidden: The policy's last hidden states.
        """
        return None, None

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for model in self.models.values():
            model.activation_checkpointing_enable(**options)


def policy_logps(policy: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities `[tokens]` of the completions under a policy by itself, a reference for instance."""
    hidden = last_hidden(policy, batch.layout)[batch.before]
    return score_tokens(bare(policy), hidden, batch.targets, temperature=temperature).logps


def lay_out(episodes: Episodes, members: Sequence[int], packed: bool, pad_id: int, device: torch.device) -> Batch:
    """Some completions after their prompts.

    Args:
        members: Numbers of the completions, those of a group side by side.
        packed: Whether in one row, in which a prompt is once for all of its completions.
    """
    pairs = [(episodes.prompt_ids[member], episodes.completion_ids[member]) for member in members]
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
    if packed:
        groups = groupby(range(len(rows)), lambda row: members[row] // episodes.group_size)
        layout = pack(rows, [tuple(group) for _, group in groups], device)
    else:
        layout = pad(rows, pad_id, device)
    spans = [(len(prompt) - 1, len(row) - 1) for (prompt, _), row in zip(pairs, rows, strict=True)]
    return Batch(
        layout,
        before=torch.cat([layout.where[index, first:end] for index, (first, end) in enumerate(spans)]),
        last=torch.stack([layout.where[index, end] for index, (_, end) in enumerate(spans)]),
        targets=torch.cat([row[first + 1 :] for row, (first, _) in zip(rows, spans, strict=True)]).to(device),
    )
