"""How long rows are, in tokens, and what a limit makes of each. Torch-free; token_columns.py knows how rows are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NEVER = 2**31 - 1
"""What a row needs that no limit leaves anything of."""
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class RowLengths:
    """Of each row what it needs of a limit, int64 `[rows]`, in tokens."""

    limit: int | None
    """Longest that a row may be; None for any."""
    least: np.ndarray
    """With a smaller limit the row is lost: nothing of its prompt or of a completion would be left."""
    whole: np.ndarray
    """With a smaller limit the row is cut, if it is not lost."""
    why_lost: str
    """What makes rows be lost, in words."""
    numbers: np.ndarray | None = None
    """Which row of its source each was, counted from 1, where they are in another order than that."""

    @classmethod
    def of(cls, limit: int | None, needed: Sequence[tuple[int, int]] | np.ndarray, why_lost: str) -> RowLengths:
        """Of what each row needs so as not to be lost, and so as not to be cut."""
        least, whole = np.asarray(needed, np.int64).reshape(-1, 2).T
        return cls(limit, least, whole, why_lost)

    @property
    def lost(self) -> np.ndarray:
        """bool `[rows]`"""
        return self.least > (NEVER - 1 if self.limit is None else self.limit)

    @property
    def cut(self) -> np.ndarray:
        """bool `[rows]`: a row that is lost is not cut."""
        return ~self.lost & (self.whole > (NEVER if self.limit is None else self.limit))

    def why(self, row: int) -> str:
        """Why a row is lost."""
        return "nothing of it is trained on" if self.least[row] >= NEVER else self.why_lost

    def percentiles(self) -> dict[str, int]:
        """Of the lengths of whole rows; half of them are as long as `50 %` says or shorter."""
        if not len(self.whole):
            return {}
        found = np.percentile(self.whole, _PERCENTILES, method="higher").astype(int).tolist()
        return {f"{p} %": value for p, value in zip(_PERCENTILES, found, strict=True)} | {"max": int(self.whole.max())}

    def described(self) -> str:
        """The percentiles for people."""
        *most, (_, longest) = self.percentiles().items()
        shown = ", ".join(f"{share} of the rows have up to {length:,}" for share, length in most[:1])
        shown += "".join(f", {share} up to {length:,}" for share, length in most[1:])
        return f"{shown}, the longest has {longest:,} tokens"


def limit_for(needed: np.ndarray, share: float) -> int | None:
    """The smallest limit below which at most a share of rows is, by what each needs; None where no limit does."""
    beyond = int(share * len(needed))
    if beyond >= len(needed):
        return 1
    found = int(np.sort(needed)[len(needed) - 1 - beyond])
    return found if found < NEVER else None


def table(lengths: RowLengths) -> dict[str, Any]:
    """For the record."""
    return {"limit": lengths.limit} | lengths.percentiles()
