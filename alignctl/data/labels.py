"""What a label says of a completion: wanted, or not. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.data.messages import BadRow

LABELS = ("label", "kto_tag", "thumbs", "thumb", "desirable")
"""Columns that say whether a completion is wanted."""

_WANTED = (
    "true 1 yes good wanted desirable desired positive pos correct chosen accepted up upvote thumbs_up thumbsup like "
    "liked + "
    "\N{THUMBS UP SIGN}"
)
_UNWANTED = (
    "false 0 -1 no bad unwanted undesirable undesired negative neg incorrect rejected down downvote thumbs_down "
    "thumbsdown dislike disliked - \N{THUMBS DOWN SIGN}"
)
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
        KeyError: There is no label.
    """
    name = label_column(row) or next((name for name in LABELS if row.get(name) not in (None, "")), LABELS[0])
    meaning = _meaning(row[name])
    if meaning is None:
        raise BadRow(f"`{name}` must be true or false (1 or 0, good or bad, up or down, 1 or -1), got `{row[name]}`")
    return meaning


def _meaning(value: Any) -> bool | None:
    if isinstance(value, float) and value.is_integer():  # as pandas writes them beside empty cells
        value = int(value)
    if not isinstance(value, (str, int)):
        return None
    word = str(value).strip().lower().translate(_SKINS).replace(" ", "_").removesuffix(".0")
    word = word[:1] + word[1:].replace("-", "_")  # thumbs-up, but -1
    return _WORDS.get("1" if word == "+1" else word)
