"""Open-Assistant's trees of messages: each has replies, and people ranked those to one prompt. Torch-free, pure.

https://huggingface.co/datasets/OpenAssistant/oasst1: `{"prompt": {"text", "role", "replies": [...]}}`, or a row for
each message with `message_id`, `parent_id`, `role`, `text` and `rank`, of which 0 is the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, TypeVar

from alignctl.data.files import BadFile, Row
from alignctl.data.messages import BadRow, Messages, Tie, as_answer, text_of

_OF_MESSAGE = {"message_id", "parent_id", "text", "role"}
_ROLES = {"prompter": "user", "assistant": "assistant"}

Node = Mapping[str, Any]
Where = TypeVar("Where")  # a row stands


def is_tree(row: Row) -> bool:
    """Whether a row is a tree."""
    return isinstance(row.get("prompt"), Mapping) and isinstance(row["prompt"].get("replies"), list)


def is_message_of_tree(row: Row) -> bool:
    """Whether a row is one message of a tree, which says what it replies to."""
    return row.keys() >= _OF_MESSAGE


def gathered(rows: Iterable[tuple[Where, Row]]) -> Iterator[tuple[Where, Row]]:
    """Trees of rows that are messages, in the order in which their first messages come, and where these stand. All are
    in memory.

    A message whose parent is not there begins a tree.

    Raises:
        BadFile: Two messages have one id, or messages reply to each other in a circle.
    """
    nodes: dict[Any, dict[str, Any]] = {}
    places: dict[Any, Where] = {}
    for place, row in rows:
        name = row.get("message_id")
        if not isinstance(name, (str, int)) or name in nodes:
            raise BadFile(f"the `message_id` of a message is `{name}`, which is none or that of another")
        nodes[name], places[name] = {**row, "replies": []}, place
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        parent = nodes.get(node.get("parent_id")) if isinstance(node.get("parent_id"), (str, int)) else None
        (roots if parent is None else parent["replies"]).append(node)
    reached, waiting = 0, list(roots)
    while waiting:
        waiting += waiting.pop()["replies"]
        reached += 1
    if reached < len(nodes):
        raise BadFile("some messages reply to each other in a circle: see their `parent_id`")
    for root in roots:
        yield places[root["message_id"]], {"prompt": root}


def ranked_pairs(row: Row) -> list[tuple[Messages, Messages, Messages]]:
    """Prompt, better and worse reply, for all prompts of a tree with ranked replies; those furthest apart first.

    Raises:
        BadRow: It is no tree.
        Tie: No reply is better than another.
    """
    found = []
    for path in _paths(row["prompt"]):
        if path[-1].get("role") != "prompter":
            continue
        ranked = sorted((r for r in _replies(path[-1]) if r.get("rank") is not None), key=lambda reply: reply["rank"])
        pairs = [both for both in combinations(ranked, 2) if both[0]["rank"] < both[1]["rank"]]
        pairs.sort(key=lambda both: both[0]["rank"] - both[1]["rank"])
        prompt = [_message(node) for node in path]
        found += [(prompt, as_answer(better["text"]), as_answer(worse["text"])) for better, worse in pairs]
    if not found:
        raise Tie("no reply of the tree is better than another")
    return found


def best_path(row: Row) -> Messages:
    """The conversation through the best replies, to the last answer; of replies without rank through the first."""
    path, node = [row["prompt"]], row["prompt"]
    while replies := _replies(node):
        node = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
        path.append(node)
    if path[-1].get("role") != "assistant":
        path.pop()  # a question that nobody answered
    return [_message(node) for node in path]


def _paths(root: Node) -> Iterator[list[Node]]:
    """From the root to each message of the tree, one reply with all that follows it before the next."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        yield path
        waiting += [[*path, reply] for reply in reversed(_replies(path[-1]))]


def _replies(node: Node) -> list[Node]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise BadRow("a reply is no message")
    there = (reply for reply in replies if str(reply.get("deleted")).lower() not in ("true", "1"))
    return [{**reply, "rank": _rank(reply.get("rank"))} for reply in there]


def _rank(value: Any) -> float | None:
    """A rank, which in a cell of a table is text; None where there is none."""
    try:
        rank = None if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"the rank of a reply is `{value}`") from error
    return None if rank is None or math.isnan(rank) else rank


def _message(node: Node) -> dict[str, Any]:
    role = node.get("role")
    if role not in _ROLES:
        raise BadRow(f"a message of a tree has the role `{role}`")
    return {"role": _ROLES[role], "content": text_of(node.get("text"), "the text of a message")}
