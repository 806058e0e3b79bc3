"""Tells whoever waits how many rows forward passes have gone through, or drawing has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_watcher: ContextVar[Callable[[int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(count: Callable[[int], None]) -> Iterator[None]:
    """For the time of a `with` block, `count` is told of more rows."""
    before = _watcher.set(count)
    try:
        yield
    finally:
        _watcher.reset(before)


def done(rows: int) -> None:
    """Says that so many rows more are done; nothing where nobody waits."""
    if (count := _watcher.get()) is not None:
        count(rows)
