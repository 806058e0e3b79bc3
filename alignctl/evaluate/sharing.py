"""Shares held-out rows out among the processes that measure together, so that N of them take an Nth of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

Item = TypeVar("Item")
Found = TypeVar("Found")


def shared_out(items: Sequence[Item], compute: Callable[[list[Item]], list[Found]]) -> list[Found]:
    """What `compute` finds of each item, in their order and the same in all processes, which call it together. Each
    computes its share of them; one for which there is none computes the first one, for nothing, because processes that
    divide a model run it together.

    Args:
        compute: Gives a number, or whatever can be sent, for each item.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return compute(list(items))
    processes, process = distributed.get_world_size(), distributed.get_rank()
    own = list(items[process::processes])
    found = compute(own or list(items[:1]))[: len(own)]
    of_all: list[Any] = [None] * processes
    distributed.all_gather_object(of_all, found)
    together: list[Any] = [None] * len(items)
    for number, part in enumerate(of_all):
        together[number::processes] = part
    return together
