"""Checks of a global batch that is given: whether the processes can share it out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.config.batches import ACCUMULATION, GLOBAL, PER_DEVICE, Batch, batch_of
from alignctl.errors import Problem


def check_batch(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether the global batch of a stage is one that its processes can make, and that its other settings do make."""
    batch = batch_of(config, name)
    if batch and batch.wanted and config[name].get("auto_find_batch_size"):
        yield Problem(
            f"`{name}.auto_find_batch_size` and `{batch.where}` exclude each other: the first makes it smaller",
            f"take `{name}.auto_find_batch_size` out: a step is divided by `{name}.pass_tokens` into what memory holds",
        )
    if batch is None or batch.wanted in (None, batch.rows):
        return
    if not batch.divides:
        yield Problem(
            f"`{batch.where}={batch.wanted}` is no multiple of {batch.unit}, {_together(batch, name)}",
            f"set {', or '.join(_instead(batch, name))}",
        )
        return
    yield Problem(
        f"`{batch.where}={batch.wanted}` and `{name}.{batch.follows}={config[name].get(batch.follows)}` contradict "
        f"each other: the second makes {batch.rows:,} of an optimizer step",
        f"take one of them out: `{name}.{batch.follows}` follows from the first, which makes it {batch.following}",
    )


def check_batch_of_all(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """Whether any stage takes the global batch at the top."""
    if config.get(GLOBAL) is not None and stages and all(GLOBAL in config[name] for name in stages):
        yield Problem(
            f"`{GLOBAL}={config[GLOBAL]}` would have no effect: every stage has one of its own", f"take `{GLOBAL}` out"
        )


def _together(batch: Batch, name: str) -> str:
    """What all processes take at least."""
    each, several = batch.unit // batch.processes, batch.processes > 1
    who = f"the {batch.processes} processes of `{name}`" if several else f"the process of `{name}`"
    if batch.follows == ACCUMULATION:
        return f"what {who} take{'' if several else 's'} at once: `{name}.{PER_DEVICE}` is {each}"
    if each > 1:
        return f"what {who} draw{'' if several else 's'} at least: `{name}.num_generations` is {each}"
    return f"the number of processes of `{name}`"


def _instead(batch: Batch, name: str) -> Iterator[str]:
    """The nearest batches that can be made, and a smaller part of each process that makes the one that is wanted."""
    assert batch.wanted is not None
    below = batch.wanted // batch.unit * batch.unit
    yield from (f"`{batch.where}={rows}`" for rows in (below, below + batch.unit) if rows)
    if size := batch.smaller_part(batch.wanted):
        yield f"`{name}.{PER_DEVICE}={size}`"
