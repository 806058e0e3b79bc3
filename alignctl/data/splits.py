"""Splits of a data set on the Hub as text: `train`, `train[:90%]`, `train+test`. Torch-free, pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_PART = re.compile(
    r"(?P<name>[^\[\]+]+)(\[((?P<first>-?\d+)(?P<first_unit>%?))?:((?P<last>-?\d+)(?P<last_unit>%?))?\])?"
)

_Part = tuple[str, str, float, float]
"""Name, unit, first and behind the last."""


def overlap(split: str, other: str) -> bool:
    """Whether two splits surely have rows in common. Nobody knows without counting whether a share and a number of rows
    do, or a number counted from the end."""
    return any(_meet(one, another) for one in _parts(split) for another in _parts(other))


def _parts(split: str) -> Iterator[_Part]:
    for text in split.split("+"):
        if (found := _PART.fullmatch(text.strip())) is None:
            continue  # `datasets` says what is wrong with it
        unit = "%" if "%" in (found["first_unit"], found["last_unit"]) else ""
        first, last = (None if found[end] is None else int(found[end]) for end in ("first", "last"))
        if unit:
            first, last = (end if end is None or end >= 0 else 100 + end for end in (first, last))
        elif min(first or 0, last or 0) < 0:
            continue
        yield found["name"], unit, first or 0, (100 if unit else math.inf) if last is None else last


def _meet(one: _Part, other: _Part) -> bool:
    (name, unit, first, last), (other_name, other_unit, other_first, other_last) = one, other
    if name != other_name:
        return False
    wholes = [(end, start) == (math.inf, 0) for start, end in ((first, last), (other_first, other_last))]
    if any(wholes):
        return True
    return unit == other_unit and max(first, other_first) < min(last, other_last)
