"""Remembers that the process was asked to stop (SIGINT, SIGTERM, SIGUSR1 or SIGHUP). Torch-free."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a process to stop; schedulers send the third before time runs out, a terminal that is closed the
last."""

SAME_REQUEST_S = 2.0
"""Signals so close together are one request: a scheduler sends them to every process, and the launcher passes its own
on to the workers, later where a machine is busy."""


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Has requests to stop handled; SIGHUP stays ignored where it is, as under nohup. Returns the handlers before."""

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _let_go_of_terminal()
        handler(number, frame)

    numbers = [one for one in STOPPING if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in numbers}


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has requests to stop handled for as long as it is entered."""
    before = handle(handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def _let_go_of_terminal() -> None:
    """Sends to nowhere what would be written to a terminal that is no longer there: it would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            if os.isatty(stream.fileno()) or not _is_there(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_there(descriptor: int) -> bool:
    """Whether a terminal can still be written to; one that is gone no longer says that it is one."""
    try:
        os.write(descriptor, b"")
    except OSError:
        return False
    return True


class StopSignal:
    """The first request waits for the end of a step while training and ends everything else at once, as
    KeyboardInterrupt; a second one ends training too."""

    def __init__(self) -> None:
        self._first: float | None = None
        self.waits = False
        """Whether a request waits for whoever looks at `requested`."""
        handle(self._receive)

    @property
    def requested(self) -> bool:
        return self._first is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None and now < self._first + SAME_REQUEST_S:
            return
        again, self._first = self.requested, self._first or now
        if again or not self.waits:
            raise KeyboardInterrupt
