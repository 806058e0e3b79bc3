"""Remembers that the process was asked to stop (SIGINT, SIGTERM or SIGUSR1). Torch-free."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a process to stop; schedulers send the third before time runs out."""


class StopSignal:
    """The first request waits for the end of a step while training and ends everything else at once, as
    KeyboardInterrupt; a second one ends training too."""

    def __init__(self) -> None:
        self.requested = False
        self.waits = False
        """Whether a request waits for whoever looks at `requested`."""
        for number in STOPPING:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or not self.waits:
            raise KeyboardInterrupt
