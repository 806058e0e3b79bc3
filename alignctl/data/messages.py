"""Messages, `[{"role", "content"}, ...]`: what is one, what of it is used, and how transcripts hold them. Torch-free.

What rows hold them in which columns is said by formats.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, str]]

# Messages as text: what a table of text makes of them.
_WRITTEN_MESSAGES = re.compile(
    r"\s*\[\s*\{\s*['\"](role|from)['\"]\s*:\s*['\"](system|user|assistant|human|gpt)['\"]"
    r"|\s*\[\s*\{\s*['\"](content|value)['\"]\s*:.*['\"](role|from)['\"]\s*:",
    re.DOTALL,
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SAYS = {"from", "value", "role"}
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip
_USED = {"role", "content"}
_TOOL_SPEAKERS = ("function_call", "function_response", "observation", "tool")
_LOST = {
    "tool_calls": "calls tools",
    "function_call": "calls tools",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts"), "has thoughts beside what it says"),
    "name": "names who speaks",
    **dict.fromkeys(("images", "image", "audio", "video", "videos"), "has parts that are not text"),
}
"""What a message may carry that nothing here would use."""
_NOTHING = (None, "", [], {})
_KINDS = {dict: "an object", list: "a list", type(None): "nothing"}
WEIGHTS = ("weight", "train", "loss")
"""Keys that say whether a message is trained on."""
MESSAGE_KEYS = {*_SAYS, "content", *_LOST, *WEIGHTS}
"""Keys of messages that are used or refused."""
_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(ValueError):
    """A row that cannot be used; the text says why, and can be written down whatever the row holds."""

    def __init__(self, why: str):
        super().__init__(writable(why))


def writable(text: str) -> str:
    """A text with halves of characters spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def is_turns(value: Any) -> bool:
    """Whether a value is a non-empty list of turns in ShareGPT's form, `{"from", "value"}`, or of messages."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and _SAYS & value[0].keys() != set()
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


def cleaned(messages: Any) -> Messages:
    """Only role and content of each message.

    Raises:
        BadRow: They are none, or hold what is not text or would be lost.
    """
    if not is_messages(messages):
        raise BadRow("expected a list of messages with role and content")
    return [_message(message) for message in messages]


def from_turns(turns: Any) -> Messages:
    """Messages of turns in ShareGPT's form.

    Raises:
        BadRow: As `cleaned`; or somebody speaks who is unknown.
    """
    if is_messages(turns):
        return cleaned(turns)
    if not is_turns(turns):
        raise BadRow("expected a list of turns with from and value")
    return [_message(_unfolded(turn)) for turn in turns]


def _unfolded(turn: Any) -> dict[str, Any]:
    """A turn with the names of a message."""
    if not isinstance(turn, Mapping):
        raise BadRow("a turn has no from and value")
    speaker = turn.get("from")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        tools = ": calls of tools are not supported" if speaker in _TOOL_SPEAKERS else ""
        raise BadRow(f"unknown speaker `{speaker}`{tools}")
    others = {key: value for key, value in turn.items() if key not in _SAYS}
    said = "content" if turn.get("value") is None and "content" in turn else "value"
    return others | {"role": role} | ({"content": turn[said]} if said in turn else {})


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise BadRow("a message has no role")
    if message.keys() - _USED:
        for key, why in _LOST.items():
            if message.get(key) not in _NOTHING:
                raise BadRow(f"a message {why} (`{key}`), which is not supported")
        if weight_of(message) != 1:
            raise BadRow(
                "a message has a weight of 0, which only demonstrations of the format `weighed_messages` leave out"
            )
    if "content" not in message:
        raise BadRow("a message has no content")
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise BadRow(f"the role of a message is `{role}`")
    return {"role": role, "content": _said(message)}


def weight_of(message: Mapping[str, Any]) -> int:
    """Whether a message is trained on: 1, or 0.

    Raises:
        BadRow: Something in between.
    """
    for key in WEIGHTS:
        if (weight := message.get(key)) is not None:
            if weight not in (0, 1):
                raise BadRow(f"a message has the {key} `{weight}`; only 0 and 1 are supported")
            return int(weight)
    return 1


def _said(message: Mapping[str, Any]) -> str:
    """What a message says: its text, or that of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow("a message has parts that are not text")
        return "".join(parts)
    return "" if content is None else text_of(content, "the content of a message")


def content_of(completion: str | Messages) -> str:
    """All that a completion says."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


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
