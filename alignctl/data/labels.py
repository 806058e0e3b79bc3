"""What a label says of a completion: wanted, or not. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.data.messages import BadRow, Tie

LABELS = ("label", "kto_tag", "thumbs", "thumb", "desirable")
"""Columns that say whether a completion is wanted."""
OF_STEPS = "labels"
"""Column of a list that says it of each step."""

_WANTED = (
    "true 1 yes good wanted desirable desired positive pos correct chosen accepted up upvote thumbs_up thumbsup like "
    "liked + "
    "\N{THUMBS UP SIGN}"
)
_UNWANTED = (
    "false 0 -1 no bad unwanted undesirable undesired negative neg incorrect rejected down downvote thumbs_down "
    "thumbsdown dislike disliked - \N{THUMBS DOWN SIGN}"
)
_NO_VOTE = "neutral"  # what 0 is made of where -1 is the other side of 1
_WORDS = dict.fromkeys(_WANTED.split(), True) | dict.fromkeys(_UNWANTED.split(), False)
_SKINS = dict.fromkeys(range(0x1F3FB, 0x1F400))  # a thumb's colour says nothing


def label_column(row: Mapping[str, Any]) -> str | None:
    """The column that says whether the answer of a row is wanted; None where none does. A label may be of something
    else: of a subject, for example."""
    return next((name for name in LABELS if _meaning(row.get(name)) is not None), None)


def label(row: Mapping[str, Any]) -> bool:
    """Whether the answer of a row is wanted.

    Raises:
        BadRow: That is not said.
        Tie: Nobody says which.
        KeyError: There is no label.
    """
    name = label_column(row) or next((name for name in LABELS if row.get(name) not in (None, "")), LABELS[0])
    if is_no_vote(row[name]):
        raise Tie(f"`{name}` says neither that the answer is wanted nor that it is not")
    meaning = _meaning(row[name])
    if meaning is None:
        raise BadRow(f"`{name}` must be true or false (1 or 0, good or bad, up or down, 1 or -1), got `{row[name]}`")
    return meaning


def is_no_vote(value: Any) -> bool:
    """Whether a label is neither side, as `without_zeros` has it."""
    return value == _NO_VOTE


def signs(row: Mapping[str, Any]) -> set[str]:
    """Which of -1 and 0 are among the labels of a row; where a source has both, 0 is neither side."""
    return {word for value in _labels(row) if (word := _word(value)) in ("-1", "0")}


def without_zeros(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of which the labels 0 say nothing."""

    def one(value: Any) -> Any:
        return _NO_VOTE if _word(value) == "0" else value

    found = {name: one(row[name]) for name in LABELS if name in row}
    if isinstance(row.get(OF_STEPS), list):
        found[OF_STEPS] = [one(value) for value in row[OF_STEPS]]
    return {**row, **found}


def _labels(row: Mapping[str, Any]) -> list[Any]:
    of_steps = row.get(OF_STEPS)
    return [row[name] for name in LABELS if name in row] + (of_steps if isinstance(of_steps, list) else [])


def _meaning(value: Any) -> bool | None:
    word = _word(value)
    return None if word is None else _WORDS.get(word)


def _word(value: Any) -> str | None:
    """A label in the spelling of the table; None where it is no text and no number."""
    if isinstance(value, float) and value.is_integer():  # as pandas writes them beside empty cells
        value = int(value)
    if not isinstance(value, (str, int)):
        return None
    word = str(value).strip().lower().translate(_SKINS).replace(" ", "_").removesuffix(".0")
    word = word[:1] + word[1:].replace("-", "_")  # thumbs-up, but -1
    return "1" if word == "+1" else word
