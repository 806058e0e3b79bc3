"""How a rollout is divided among optimizer steps, and a step among passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignctl.engine.layout import bins
from alignctl.rollout.episodes import Episodes


class PassLoss(NamedTuple):
    """What a method makes of a pass. Sums, so that how a mini-batch is divided among passes changes nothing."""

    loss: Tensor
    """Scalar, with its gradient."""
    sums: dict[str, Tensor]
    """Of the tokens of the pass that are learnt from, by the names under which their means are logged."""
    completions: Mapping[str, Tensor] = {}
    """`[completions]`, by the names under which their mean is logged, or where it ends with `_min` or `_max` the least
    or the most of them."""


class PassLogs(NamedTuple):
    """What is logged of the passes of an optimizer step, see PassLoss."""

    sums: dict[str, Tensor]
    completions: dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """An optimizer step that is made with a rollout."""

    groups: list[int]
    """Numbers of the groups of this process; none where others have more."""
    counted: float
    """What the loss is divided by; of all processes once they have told each other."""
    passes: int
    """How many there are; the most of any process once they have."""


def mini_batches(count: int, parts: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers of groups of all processes, shuffled and divided into parts of about the same size, of which some have
    none where there are fewer groups."""
    order = torch.randperm(count, generator=generator).tolist()
    for part in range(parts):
        yield order[part::parts]


def passes_of(episodes: Episodes, groups: Sequence[int], budget: int, packed: bool) -> Iterator[list[int]]:
    """Divides groups among passes of at most `budget` tokens, and a group that is larger, too: the numbers of their
    completions.

    Args:
        packed: Whether a prompt is computed once for all of its completions in a pass.
    """
    units = [unit for group in groups for unit in _units(episodes, group, budget, packed)]
    for part in bins([episodes.tokens_of(unit, packed) for unit in units], budget, padded=False):
        yield [member for item in part for member in units[item]]


def _units(episodes: Episodes, group: int, budget: int, packed: bool) -> Iterator[list[int]]:
    """A group, or as few parts of it as fit."""
    unit: list[int] = []
    for member in episodes.groups[group]:
        if unit and episodes.tokens_of([*unit, member], packed) > budget:
            yield unit
            unit = []
        unit.append(member)
    yield unit


def as_many(passes: list[list[int]], most: int) -> list[list[int]]:
    """Divides passes until there are as many as in the process that has most: processes wait for each other in every
    one. Where there is nothing left to divide, some have no completions."""
    passes = list(passes)
    while len(passes) < most and (longest := max(passes, key=len, default=[]))[1:]:
        at = passes.index(longest)
        passes[at : at + 1] = [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    return passes + [[]] * (most - len(passes))
