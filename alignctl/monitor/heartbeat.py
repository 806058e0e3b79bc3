"""Says what a process of a stage is doing, for whoever waits for it. Torch-free."""

from __future__ import annotations

import json
import os
import socket
import time

from alignctl.run.paths import StagePaths

_BYTES = 512
_ALIVE_EVERY_S = 1
TRAINING, EVALUATING, SAVING = "training", "evaluating", "saving"
_SLOW = ("starting", "reading", "loading", "saving")  # and whatever else begins so
_REHEARSAL = "rehearsing: "


class Heartbeat:
    """A file for each process, overwritten in place: cheap enough for every step."""

    def __init__(self, paths: StagePaths, rank: int):
        paths.ranks.mkdir(parents=True, exist_ok=True)
        self._file = os.open(paths.rank(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
        self._step: int | None = None
        self.beat("starting")

    def beat(self, doing: str, step: int | None = None) -> None:
        """Notes what the process does now; `step` optimizer steps are taken."""
        self._step = self._step if step is None else step
        self._doing, self._last = doing, time.monotonic()
        line = json.dumps(self._who | {"doing": doing, "step": self._step, "time": time.time()})
        os.pwrite(self._file, line.ljust(_BYTES).encode(), 0)

    def alive(self) -> None:
        """Says that the process still does what it did; as often as one likes."""
        if time.monotonic() > self._last + _ALIVE_EVERY_S:
            self.beat(self._doing)


class RehearsalHeartbeat:
    """Says what a process does of the rehearsal, in the file of the stage; its steps are none of the stage's."""

    def __init__(self, stage: Heartbeat):
        self._stage = stage

    def beat(self, doing: str, step: int | None = None) -> None:
        self._stage.beat(_REHEARSAL + doing)

    def alive(self) -> None:
        self._stage.alive()


def is_slow(doing: str) -> bool:
    """Whether what a process does may take long without a sign of life."""
    return doing.removeprefix(_REHEARSAL).startswith(_SLOW)
