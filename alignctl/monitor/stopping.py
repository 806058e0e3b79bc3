"""Remembers that the process was asked to stop (SIGINT, SIGTERM or SIGUSR1). Torch-free."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a process to stop; schedulers send the third before time runs out."""

SAME_REQUEST_S = 2.0
"""Signals so close together are one request: a scheduler sends them to every process, and the launcher passes its own
on to the workers, later where a machine is busy."""


class StopSignal:
    """The first request waits for the end of a step while training and ends everything else at once, as
    KeyboardInterrupt; a second one ends training too."""

    def __init__(self) -> None:
        self._first: float | None = None
        self.waits = False
        """Whether a request waits for whoever looks at `requested`."""
        for number in STOPPING:
            signal.signal(number, self._receive)

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
