"""Messages, `[{"role", "content"}, ...]`: what is one, what of it is used, and how transcripts hold them. Torch-free.

What rows hold them in which columns is said by formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, str]]

# What a table of text makes of a list of messages.
_WRITTEN_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(ValueError):
    """A row that cannot be used; the text says why."""


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def is_written_out(value: Any) -> bool:
    """Whether a value is messages as text, as tables of text hold them."""
    return isinstance(value, str) and _WRITTEN_MESSAGES.match(value) is not None


def cleaned(messages: Any) -> Messages:
    """Only role and content of each message.

    Raises:
        BadRow: They are none, or hold what is not text.
    """
    if not is_messages(messages):
        raise BadRow("expected a list of messages with role and content")
    return [{"role": str(m["role"]), "content": _said(m)} for m in messages]


def _said(message: Mapping[str, Any]) -> str:
    """What a message says: its text, or that of its parts."""
    content = message.get("content")
    if message.get("tool_calls"):
        raise BadRow("a message calls tools, which is not supported")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if None in parts:
            raise BadRow("a message has parts that are not text")
        return "".join(parts)
    if content is not None and not isinstance(content, str):
        raise BadRow(f"the content of a message is {type(content).__name__}, not text")
    return content or ""


def content_of(completion: str | Messages) -> str:
    """All that a completion says."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def as_answer(text: Any) -> Messages:
    """A completion of one message."""
    return [{"role": "assistant", "content": str(text or "")}]


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
