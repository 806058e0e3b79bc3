"""Shares held-out rows out among the processes that measure together, so that N of them take an Nth of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed, nn

from alignctl.engine.tensor_parallel import place_among_rows

Item = TypeVar("Item")
Found = TypeVar("Found")


def shared_out(
    model: nn.Module,
    items: Sequence[Item],
    size: Callable[[Item], int],
    compute: Callable[[list[Item]], list[Found]],
) -> list[Found]:
    """What `compute` finds of each item, in their order and the same in all processes, which call it together. Each
    computes its share of them; one for which there is none computes the first one, for nothing, because processes that
    divide a model run it together.

    Args:
        model: That computes them: processes that divide the matrices of its layers have the same share.
        size: Of an item, in tokens: each process gets as many long ones as the others.
        compute: Gives a number, or whatever can be sent, for each item.
    """
    processes, process = place_among_rows(model)
    if processes == 1:
        return compute(list(items))
    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    own = [items[index] for index in order[process::processes]]
    found = compute(own or list(items[:1]))[: len(own)]
    of_all: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_all, found)
    together: list[Any] = [None] * len(items)
    for number, part in enumerate(of_all[:: len(of_all) // processes]):
        for index, one in zip(order[number::processes], part, strict=True):
            together[index] = one
    return together
