"""Whether the length that a stage allows leaves enough of its rows, and which one would. Looks at no model."""

from __future__ import annotations

import math

import numpy as np

from alignctl.config.stages import StageConfig
from alignctl.data.lengths import RowLengths, limit_for
from alignctl.errors import RequestError

_FEW = 0.01  # of the rows may be cut, by what is advised


def check_lengths(lengths: RowLengths, stage: StageConfig, field: str, seen: int | None) -> None:
    """Whether few enough training rows are lost, and are cut.

    Args:
        field: The setting that says how long rows may be.
        seen: As long as the model can take them; None for any length.

    Raises:
        RequestError: Too many are.
    """
    data, count = stage.data, len(lengths.least)
    lost, cut = int(lengths.lost.sum()), int(lengths.cut.sum())
    where = f"with `{stage.name}.{field}={lengths.limit}`"
    if lost == count or lost > data.max_lost * count:
        why = lengths.why(int(lengths.lost.argmax()))
        raise RequestError(
            f"{_of(lost, count)} are lost: {where} {why}, and `data.max_lost={data.max_lost:g}` is the "
            f"most allowed; {lengths.described()}",
            f"{_enough(lengths.least, data.max_lost, stage, field, seen)}, or take long rows out"
            + (f"; `data.max_lost={_share(lost, count)}` accepts it" if lost < count else ""),
        )
    if data.max_truncated is not None and cut > data.max_truncated * count:
        raise RequestError(
            f"{_of(cut, count)} are cut: {where} they are longer, and "
            f"`data.max_truncated={data.max_truncated:g}` is the most allowed; {lengths.described()}",
            f"{_enough(lengths.whole, data.max_truncated, stage, field, seen)}, or take long rows out; "
            f"`data.max_truncated={_share(cut, count)}` accepts it",
        )


def said_of_cut(lengths: RowLengths, stage: StageConfig, field: str, seen: int | None) -> str | None:
    """What people should know of rows that are cut; None where none are."""
    count, cut = len(lengths.whole), int(lengths.cut.sum())
    if not cut:
        return None
    said = f"{_of(cut, count)} are cut to `{stage.name}.{field}={lengths.limit}`; {lengths.described()}"
    if cut <= _FEW * count:
        return said
    return f"{said}. To cut at most {100 * _FEW:g} %, {_enough(lengths.whole, _FEW, stage, field, seen)}"


def _of(some: int, count: int) -> str:
    return f"{some:,} of {count:,} training rows ({math.ceil(100 * some / count)} %)"


def _share(some: int, count: int) -> str:
    return f"{math.ceil(100 * some / count) / 100:g}"


def _enough(needed: np.ndarray, share: float, stage: StageConfig, field: str, seen: int | None) -> str:
    """Advises the smallest limit below which at most a share of rows is."""
    limit = limit_for(needed, share)
    if limit is None:
        return "give other rows"
    if seen is not None and limit > seen:
        return (
            f"`{stage.name}.{field}={limit}` would do, but the model can see only {seen:,} tokens: give another model"
        )
    return f"set `{stage.name}.{field}={limit}`"
