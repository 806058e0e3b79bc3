"""How much of each of several sources a mixture takes, and in which order. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Stopping = Literal["first_exhausted", "all_exhausted"]


def mixture(
    sizes: Sequence[np.ndarray],
    weights: Sequence[float] | None,
    stopping: Stopping,
    seed: int,
    limit: int | None = None,
    starts: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Rows of sources that lie one behind another, in the order of the mixture.

    Each source is shuffled and gone through from its beginning, again if need be; which source comes next is drawn. The
    order depends on nothing but what is given.

    Args:
        sizes: Of each source, what each row counts, int64 `[rows]`: 1, or its tokens.
        weights: What share of the sum of sizes each source has, as parts of their sum; None takes every row once.
        stopping: `first_exhausted`: as much as there is without taking a row twice; `all_exhausted`: as little as has
            every row at least once. As `datasets.interleave_datasets` means them.
        limit: At most so many rows, in the same shares.
        starts: Of each source, bool `[rows]`: whether a row does not have to stay together with the one before.

    Returns:
        int64 `[rows of the mixture]`, counted through all sources.
    """
    starts = starts or [np.ones(len(own), bool) for own in sizes]
    # What stays together is one thing: where it begins, how many rows it has, and what it counts.
    first = [np.flatnonzero(own) for own in starts]
    rows = [np.diff(own, append=len(each)) for own, each in zip(first, sizes, strict=True)]
    counts = [np.add.reduceat(each, own) for each, own in zip(sizes, first, strict=True)]
    totals = np.array([own.sum() for own in counts], float)
    shares = totals / totals.sum() if weights is None else np.array(weights) / sum(weights)
    whole = {"first_exhausted": min, "all_exhausted": max}[stopping](totals / shares)
    random = np.random.RandomState(seed)  # whose numbers are the same in every version of numpy
    orders = [random.permutation(len(own)) for own in counts]
    taken = [_enough(*one) for one in zip(orders, counts, shares * whole, strict=True)]
    there = sum(int(own[order].sum()) for own, order in zip(rows, taken, strict=True))
    if limit is not None and there > limit:
        taken = [_enough(*one) for one in zip(orders, counts, shares * whole * limit / there, strict=True)]
    before = np.cumsum([0, *map(len, sizes)])
    begin = np.concatenate([before[i] + first[i][order] for i, order in enumerate(taken)])
    length = np.concatenate([own[order] for own, order in zip(rows, taken, strict=True)])
    order = random.permutation(len(begin))
    if limit is not None:
        order = order[: max(1, int(np.searchsorted(np.cumsum(length[order]), limit, side="right")))]
    begin, length = begin[order], length[order]
    return np.repeat(begin - np.cumsum(length) + length, length) + np.arange(length.sum())


def _enough(order: np.ndarray, counts: np.ndarray, wanted: float) -> np.ndarray:
    """As many of some things as come nearest to a sum of what they count, one at least, again from the beginning where
    there are too few."""
    again = np.tile(order, max(1, int(np.ceil(wanted / counts.sum()))))
    sums = np.concatenate([[0], np.cumsum(counts[again])])
    return again[: max(1, int(np.abs(sums - wanted).argmin()))]
