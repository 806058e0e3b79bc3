"""Says what a process of a stage is doing, for whoever waits for it. Torch-free."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from alignctl.run.paths import StagePaths

_BYTES = 512
_ALIVE_EVERY_S = 1
TRAINING, EVALUATING, SAVING = "training", "evaluating", "saving"
_AT_FIRST = ("starting", "reading", "loading")  # and whatever else begins so
_SLOW = (*_AT_FIRST, "saving")
_WORK_EVERY_S, _WORK_S = 5, 0.2  # how often is looked, and seconds of processor time that count: waiting takes none
_REHEARSAL = "rehearsing: "


class Heartbeat:
    """A file for each process, overwritten in place: cheap enough for every step."""

    def __init__(self, paths: StagePaths, rank: int):
        paths.ranks.mkdir(parents=True, exist_ok=True)
        self._file = os.open(paths.rank(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
        self._step: int | None = None
        self._said: dict[str, Any] = {}
        self._worked_s = time.process_time()
        self._lock = threading.Lock()
        self.beat("starting")
        threading.Thread(target=_note_work, args=(weakref.ref(self),), daemon=True).start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Notes what the process does now; `step` optimizer steps are taken."""
        self._step = self._step if step is None else step
        self._doing, self._last = doing, time.monotonic()
        self._write({"doing": doing, "step": self._step, "time": time.time()})

    def alive(self) -> None:
        """Says that the process still does what it did; as often as one likes."""
        if time.monotonic() > self._last + _ALIVE_EVERY_S:
            self.beat(self._doing)

    def note_work(self) -> None:
        """Notes how much processor time was taken, if that is more than waiting takes."""
        worked_s = time.process_time()
        if worked_s > self._worked_s + _WORK_S:
            self._worked_s = worked_s
            self._write({"worked_s": worked_s})

    def _write(self, news: Mapping[str, Any]) -> None:
        with self._lock:
            self._said |= news
            os.pwrite(self._file, json.dumps(self._who | self._said).ljust(_BYTES).encode(), 0)


def _note_work(of: weakref.ref[Heartbeat]) -> None:
    """Runs beside the process, which says nothing while it reads or loads, for as long as there is its heartbeat."""
    while (heartbeat := of()) is not None:
        heartbeat.note_work()
        del heartbeat
        time.sleep(_WORK_EVERY_S)


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


def ends_at_once(doing: str) -> bool:
    """Whether a request to stop ends what a process does without delay: there is nothing to save."""
    return doing.removeprefix(_REHEARSAL).startswith(_AT_FIRST)


def without_work(beat: Mapping[str, Any]) -> dict[str, Any]:
    """What a process says of itself but for how much it has worked."""
    return {key: value for key, value in beat.items() if key != "worked_s"}
