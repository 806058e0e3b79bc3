"""What is learnt from a rollout, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignctl.rollout.episodes import Episodes
from alignctl.rollout.rewards import Score
from alignctl.trainers.on_policy.models import Outputs

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


@dataclass(frozen=True)
class Experience:
    """What a rollout is worth, `[completions, length]` each; a method may have more."""

    present: Tensor
    """Where there are tokens."""
    mask: Tensor
    """Where there are tokens that the policy learns from."""
    completion: Tensor
    """Of which completion of the rollout a token is: for losses that add up over a completion."""
    logps: Tensor | None
    """Of the policy that drew the tokens; None where that is what each pass of the update finds."""
    ref_logps: Tensor | None
    """None without a reference."""
    advantages: Tensor

    def of(self, members: Sequence[int]) -> Self:
        """That of some completions, their tokens one after another: `[tokens]` each."""
        here = self.present[list(members)]
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        flat = {name: value[list(members)][here] for name, value in given.items() if value is not None}
        return replace(self, **flat)


def spread(flat: Tensor | None, episodes: Episodes) -> Tensor | None:
    """`[tokens]` of all completions as `[completions, length]`, 0 behind their ends."""
    lengths = [len(completion) for completion in episodes.completion_ids]
    return None if flat is None else pad_sequence(flat.split(lengths), batch_first=True)


def masks(episodes: Episodes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`[completions, length]`: where there are tokens, which of them the policy learns from, and of which completion
    they are."""
    trained = [torch.tensor(one, device=device, dtype=torch.bool) for one in episodes.trained]
    mask = pad_sequence(trained, batch_first=True)
    count = torch.tensor([len(one) for one in trained], device=device)
    present = torch.arange(mask.size(1), device=device) < count[:, None]
    return present, mask, torch.arange(len(mask), device=device)[:, None].expand_as(mask)


def build(episodes: Episodes, outputs: Outputs, advantages: Tensor) -> Experience:
    """Of advantages `[completions, length]`, or `[completions, 1]` where all tokens of a completion have the same."""
    present, mask, completion = masks(episodes, outputs.logps.device)
    logps, ref_logps = (spread(one, episodes) for one in (outputs.logps, outputs.ref_logps))
    return Experience(present, mask, completion, logps, ref_logps, advantages.expand_as(mask) * mask)


def at_tokens(scores: Sequence[Score], like: Tensor) -> Tensor:
    """Scores as `[completions, length]`, each number at its token."""
    whole = torch.zeros_like(like)
    for row, score in zip(whole, scores, strict=True):
        for token, value in score.items():
            if 0 <= token < len(row):  # an empty completion has no last token
                row[token] += value
    return whole


def moments(values: Tensor, mask: Tensor, add_up: Sum) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance under a mask, over all processes: of sums in float64, which are asked for at once."""
    kept = values.double() * mask
    total, squares, count = add_up(torch.stack([kept.sum(), (kept**2).sum(), mask.double().sum()]))
    mean = total / count.clamp(min=1)
    var = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    return mean.to(values.dtype), var.to(values.dtype)
