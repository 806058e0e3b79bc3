"""Messages as templates take them, of those that rows have: what of a message is used, and what is refused. Torch-free.

Beside role and content a message keeps calls of tools, thoughts and names, each under the key that templates know it
by. Whether a template writes them is looked at by rendering.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.data.messages import (
    NOT_TEXT,
    NOTHING,
    TURN_KEYS,
    BadRow,
    Messages,
    is_messages,
    is_turns,
    text_of,
)
from alignctl.data.tools import call_in, calls_of

_SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant", "system": "system",
    "observation": "tool", "function_response": "tool", "function": "tool", "tool": "tool",
    "function_call": "assistant",
}  # fmt: skip
"""Who speaks, by the names that rows have for them in any spelling."""
_CALLS = "function_call"  # who speaks where ShareGPT has a call, as JSON
_BARE = {"role", "content"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_WRITTEN_THOUGHTS = ("reasoning_content", "thinking")  # a template knows one of them
_NAMES = ("name", "tool_call_id")
WEIGHTS = ("weight", "train", "loss")
"""Keys that say whether a message is trained on."""
MESSAGE_KEYS = {*TURN_KEYS, "content", "tool_calls", "function_call", *_THOUGHTS, *_NAMES, *NOT_TEXT, *WEIGHTS}
"""Keys of messages that are used or refused."""


def cleaned(messages: Any) -> Messages:
    """What is used of each message.

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


def is_bare(messages: Messages) -> bool:
    """Whether messages have nothing but role and content."""
    return all(message.keys() == _BARE for message in messages)


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


def _unfolded(turn: Any) -> dict[str, Any]:
    """A turn with the names of a message."""
    if not isinstance(turn, Mapping):
        raise BadRow("a turn has no from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or _spelled(speaker) not in _SPEAKERS:
        raise BadRow(f"unknown speaker `{speaker}`")
    others = {key: value for key, value in turn.items() if key not in TURN_KEYS}
    said = "content" if turn.get("value") is None and "content" in turn else "value"
    return others | {"role": speaker} | ({"content": turn[said]} if said in turn else {})


def _spelled(speaker: str) -> str:
    return speaker.strip().lower().replace(" ", "_")


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise BadRow("a message has no role")
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise BadRow(f"the role of a message is `{role}`")
    if _spelled(role) == _CALLS and "tool_calls" not in message:
        message = {**message, "content": "", "tool_calls": call_in(message.get("content"))}
    more = _more(message) if message.keys() - _BARE else {}
    if "content" not in message and "tool_calls" not in more:
        raise BadRow("a message has no content")
    return {"role": _SPEAKERS.get(_spelled(role), role), "content": _said(message)} | more


def _more(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has beside role and content."""
    if name := next((name for name in NOT_TEXT if message.get(name) not in NOTHING), None):
        raise BadRow(f"a message has parts that are not text (`{name}`), which is not supported")
    if weight_of(message) != 1:
        raise BadRow(
            "a message has a weight of 0, which only demonstrations of the format `weighed_messages` leave out"
        )
    more: dict[str, Any] = {}
    if (name := next((name for name in _THOUGHTS if message.get(name) not in NOTHING), None)) is not None:
        more |= dict.fromkeys(_WRITTEN_THOUGHTS, text_of(message[name], f"the `{name}` of a message"))
    if calls := calls_of(message):
        more["tool_calls"] = calls
    return more | {
        name: text_of(message[name], f"the `{name}` of a message")
        for name in _NAMES
        if message.get(name) not in NOTHING
    }


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
