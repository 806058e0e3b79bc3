"""Tools that an answer may call, and calls of them, in the one form that chat templates take. Torch-free, pure.

A tool is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call
`{"type": "function", "function": {"name", "arguments"}}` with an object of arguments:
https://huggingface.co/docs/transformers/chat_extras.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignctl.data.messages import NOTHING, BadRow

TOOLS = ("tools", "functions")
"""Columns of what an answer may call; the second is OpenAI's former name."""

Tool = dict[str, Any]


def tools_of(row: Mapping[str, Any]) -> list[Tool] | None:
    """The tools of a row; None where it has none.

    Raises:
        BadRow: They are not a list of functions.
    """
    name = next((name for name in TOOLS if row.get(name) not in NOTHING), None)
    if name is None:
        return None
    tools = _parsed(row[name], f"`{name}`")
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list):
        raise BadRow(f"`{name}` must be a list of functions")
    return [_wrapped(tool, name) for tool in tools] or None


def _wrapped(tool: Any, column: str) -> Tool:
    """A tool with what OpenAI's and ShareGPT's older rows have not around it."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"`{column}` has a function without a name")
    return dict(tool) if function is not tool else {"type": "function", "function": dict(tool)}


def calls_of(message: Mapping[str, Any]) -> list[Tool]:
    """What a message calls: `tool_calls`, or OpenAI's former `function_call`.

    Raises:
        BadRow: A call has no name, or arguments that are no object.
    """
    calls = message.get("tool_calls")
    if calls in NOTHING:
        calls = message.get("function_call")
        return [] if calls in NOTHING else [_call(calls)]
    calls = _parsed(calls, "`tool_calls`")
    if not isinstance(calls, list):
        raise BadRow("`tool_calls` must be a list")
    return [_call(call) for call in calls]


def call_in(text: Any) -> list[Tool]:
    """The calls that ShareGPT's turns of `function_call` hold as text: one, or a list.

    Raises:
        BadRow: It is none.
    """
    calls = _parsed(text, "a turn of `function_call`")
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> Tool:
    call = _parsed(call, "a call of a tool")
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("a call of a tool has no name")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments in (None, "") else _parsed(arguments, "the arguments of a call")
    if not isinstance(arguments, Mapping):
        raise BadRow("the arguments of a call are no object")
    others = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
    return others | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _parsed(value: Any, what: str) -> Any:
    """A value, or what it says where it is JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is text, and no JSON: {error}") from error
