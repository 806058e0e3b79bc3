"""How sure measured numbers are: of how many rows they are, between which values they lie, and whether a change is more
than chance. Torch-free, pure.

The rows are the same before and after, so a change is looked at row by row, which finds much smaller ones than two
intervals that do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

_LEVEL = 0.95
_FEWEST = 5
"""Batches that are compared: of fewer the quantile is so large that hardly any change would be more than chance."""
_Z = NormalDist().inv_cdf((1 + _LEVEL) / 2)


@dataclass(frozen=True)
class Certainty:
    """Of one metric."""

    n: int
    """Rows or answers that it is of."""
    before: tuple[float, float] | None
    """Of a share: its 95 % interval."""
    after: tuple[float, float] | None
    within_noise: bool | None
    """Whether what changed may be chance; None where there is nothing to compare, or only one number of all rows, or
    those of a few batches."""


def certainty(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> dict[str, Certainty]:
    """How sure the metrics of two evaluations are, by name.

    Args:
        before: What each row has, of the metrics that are means over them; empty where nothing was measured.
        after: The same afterwards.
        counts: Of the other metrics: how many rows they are of.
    """
    found = {name: Certainty(n, None, None, None) for name, n in counts.items()}
    for name, values in after.items():
        then = before.get(name)
        known = then is not None and len(then) == len(values)
        found[name] = Certainty(
            len(values), _of_share(then or ()), _of_share(values), within_noise(then, values) if known else None
        )
    return found


def of_wins(rate: float, n: int) -> Certainty:
    """How sure a win rate against what was before is: it says nothing where half of all may be true, too."""
    low, high = wilson(rate, n)
    return Certainty(n, None, (low, high), low <= 0.5 <= high)


def of_sums(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], counts: Mapping[str, int]
) -> dict[str, Certainty]:
    """How sure metrics are that are sums over batches of the same rows before and after, and no means over rows: what
    each batch adds is compared as what each row has would be, where there are enough of them.

    Args:
        before: What each batch adds, by the name of the metric.
        after: The same afterwards.
        counts: How many rows each metric is of.
    """
    return {
        name: Certainty(counts[name], None, None, within_noise(then, after[name]))
        for name, then in before.items()
        if _FEWEST <= len(then) == len(after.get(name, ()))
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` (Wilson 1927; Brown, Cai and DasGupta 2001, Eq. 4)."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def within_noise(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean of the same rows before and after may differ by chance, at 5 %: of shares by the exact test of
    McNemar (1947), of other numbers by Student's of their differences."""
    changes = [now - then for then, now in zip(before, after, strict=True)]
    if _are_shares(before) and _are_shares(after):
        more, less = changes.count(1.0), changes.count(-1.0)
        return _both_tails(min(more, less), more + less) >= 1 - _LEVEL
    if len(changes) < 2:
        return True
    return abs(fmean(changes)) <= _student(len(changes) - 1) * stdev(changes) / math.sqrt(len(changes))


def _are_shares(values: Sequence[float]) -> bool:
    return set(values) <= {0.0, 1.0}


def _of_share(values: Sequence[float]) -> tuple[float, float] | None:
    return wilson(fmean(values), len(values)) if values and _are_shares(values) else None


def _both_tails(least: int, n: int) -> float:
    """Chance that of `n` throws of a coin one side is seen `least` times or fewer."""
    ways = of_all = 1
    for k in range(least):
        ways = ways * (n - k) // (k + 1)
        of_all += ways
    return min(1.0, 2 * of_all / 2**n)


def _student(free: int) -> float:
    """The two-sided 95 % quantile of Student's t with so many degrees of freedom (Abramowitz and Stegun, 26.7.5): from
    3 on within 1 %, with 1 and 2 too small."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    )
