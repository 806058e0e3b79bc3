"""What several people say of two completions: which one most prefer, and how far they agree. Torch-free, pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from alignctl.data.messages import BadRow

SIDES = tuple(
    (f"{name}{separator}{first}", f"{name}{separator}{second}")
    for name in ("response", "completion", "answer", "output")
    for separator in ("_", "")
    for first, second in (("a", "b"), ("1", "2"))
)
"""Columns of two completions to vote on."""
WINNER = "winner"
"""Column of one vote, as chatbot arenas have it."""
_FIRST, _SECOND, _TIE = 1, 2, 0
_ANNOTATOR = re.compile(r"(?:annotator|vote|rater|judge)_?\d+")
_SAYS = re.compile(r"(?:(?:response|completion|answer|output|model)_?)?([12ab])")
_WORDS = {"first": _FIRST, "second": _SECOND} | dict.fromkeys(
    ("0 tie tie_(bothbad) tie_(both_bad) both both_bad neither equal same none".split()), _TIE
)


def sides_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of the two completions of a row; None where it has no such two."""
    return next((both for both in SIDES if all(row.get(name) is not None for name in both)), None)


def vote_columns(row: Mapping[str, Any]) -> list[str]:
    """Columns that hold votes: `votes`, `winner`, or one for each person."""
    if isinstance(row.get("votes"), list):
        return ["votes"]
    if row.get(WINNER) is not None:
        return [WINNER]
    return [name for name in row if _ANNOTATOR.fullmatch(name)]


def votes_of(row: Mapping[str, Any]) -> list[int]:
    """What each person says: 1 or 2 for the better completion, 0 for neither. Who says nothing is left out.

    Raises:
        BadRow: Somebody says something else.
    """
    columns = vote_columns(row)
    said = row["votes"] if columns == ["votes"] else [row[name] for name in columns]
    return [_vote(value) for value in said if value not in (None, "")]


def _vote(value: Any) -> int:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    word = str(whole).strip().lower().replace(" ", "_").removesuffix(".0")
    if isinstance(value, bool) or not (word in _WORDS or _SAYS.fullmatch(word)):
        raise BadRow(f"a vote is `{value}`, and has to be 1 or 2 (a or b), or 0 (tie)")
    if word in _WORDS:
        return _WORDS[word]
    return _FIRST if _SAYS.fullmatch(word)[1] in "1a" else _SECOND


def preferred(votes: list[int]) -> int:
    """What more people say than anything else; 0 where there is no such thing, or that is a tie."""
    (most, count), (_, next_count), *_ = [*Counter(votes).most_common(2), (_TIE, 0), (_TIE, 0)]
    return most if count > next_count else _TIE


def agreement(votes: list[int]) -> float | None:
    """The share of pairs of people who say the same, Fleiss 1971 (doi:10.1037/h0031619), Eq. 2; None for one person."""
    pairs = list(combinations(votes, 2))
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None
