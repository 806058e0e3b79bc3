"""Messages, `[{"role", "content", ...}, ...]`: what is one, and how transcripts hold them. Torch-free.

What rows hold them in which columns is said by formats.py; what of a message is used, by cleaning.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, Any]]

# Messages as text: what a table of text makes of them.
_WRITTEN_MESSAGES = re.compile(
    r"\s*\[\s*\{\s*['\"](role|from)['\"]\s*:\s*['\"](system|user|assistant|human|gpt)['\"]"
    r"|\s*\[\s*\{\s*['\"](content|value)['\"]\s*:.*['\"](role|from)['\"]\s*:",
    re.DOTALL,
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
TURN_KEYS = {"from", "value", "role"}
"""Keys of who says what in ShareGPT's turns, and in messages."""
NOTHING = (None, "", "[]", "{}", [], {})
"""Values of columns and keys that say nothing."""
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
"""Columns and keys of what is not text."""
_KINDS = {dict: "an object", list: "a list", type(None): "nothing"}
_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(ValueError):
    """A row that cannot be used; the text says why, and can be written down whatever the row holds."""

    def __init__(self, why: str):
        super().__init__(writable(why))


class Tie(BadRow):
    """A row that is as it should be, and of which no completion is better than another."""


def writable(text: str) -> str:
    """A text with halves of characters spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def is_turns(value: Any) -> bool:
    """Whether a value is a non-empty list of turns in ShareGPT's form, `{"from", "value"}`, or of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and TURN_KEYS & value[0].keys() != set()
    )


def is_written_out(value: Any) -> bool:
    """Whether a value is messages as text, as tables of text hold them."""
    return isinstance(value, str) and _WRITTEN_MESSAGES.match(value) is not None


def text_of(value: Any, what: str) -> str:
    """A value as text: of a number, of true and of false their JSON.

    Args:
        what: The value, for people.

    Raises:
        BadRow: It is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and (not isinstance(value, float) or math.isfinite(value)):
        return json.dumps(value)
    raise BadRow(f"{what} is {_KINDS.get(type(value), type(value).__name__)}, not text")


def content_of(completion: str | Messages) -> str:
    """All that a completion says."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def says_something(completion: str | Messages) -> bool:
    """Whether a completion has words, or calls a tool."""
    calls = not isinstance(completion, str) and any(message.get("tool_calls") for message in completion)
    return calls or content_of(completion).strip() != ""


def as_answer(text: Any) -> Messages:
    """A completion of one message."""
    return [{"role": "assistant", "content": "" if text is None else text_of(text, "a completion")}]


def is_transcript(text: Any) -> bool:
    """Whether a value is text in Anthropic's form, `Human: ... Assistant: ...`."""
    return isinstance(text, str) and text.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in text


def read_transcript(text: str) -> Messages:
    """The messages of a transcript, in turn."""
    parts = _TURN.split("\n\n" + text.lstrip("\n"))
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def write_transcript(messages: Messages) -> str:
    """Anthropic's plain form, https://github.com/anthropics/hh-rlhf: a prompt ends with `Assistant:`."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{names.get(m['role'], m['role'].title())}: {m['content']}" for m in messages)
    return turns + "\n\nAssistant:"
