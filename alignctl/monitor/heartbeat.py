"""Says what a process of a stage is doing, for whoever waits for it. Torch-free."""

from __future__ import annotations

import json
import os
import socket
import time

from alignctl.run.paths import StagePaths

_BYTES = 512
TRAINING, EVALUATING = "training", "evaluating"


class Heartbeat:
    """A file for each process, overwritten in place: cheap enough for every step."""

    def __init__(self, paths: StagePaths, rank: int):
        paths.ranks.mkdir(parents=True, exist_ok=True)
        self._file = os.open(paths.rank(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._step: int | None = None
        self.beat("starting")

    def beat(self, doing: str, step: int | None = None) -> None:
        """Notes what the process does now; `step` optimizer steps are taken."""
        self._step = self._step if step is None else step
        line = json.dumps(self._who | {"doing": doing, "step": self._step, "time": time.time()})
        os.pwrite(self._file, line.ljust(_BYTES).encode(), 0)
