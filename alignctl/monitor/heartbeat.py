"""Says what a process of a stage is doing and how far it is, for whoever waits for it. Torch-free."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignctl.run.owner import plain
from alignctl.run.paths import StagePaths
from alignctl.run.process import node

_SLOT = 512  # bytes of a machine's file that one of its processes writes
_SAY_EVERY_S = 1
TRAINING, EVALUATING, SAVING = "training", "evaluating", "saving"
_AT_FIRST = ("starting", "reading", "loading")  # and whatever else begins so
_LOOK_EVERY_S = 5
_NOTABLE = 2**20  # bytes: logs and heartbeats are no progress
_REHEARSAL = "rehearsing: "


class Heartbeat:
    """One file for the processes of a machine, each of which overwrites its own part in place: cheap enough for every
    step, and quiet where many machines share a file system."""

    def __init__(self, paths: StagePaths, rank: int):
        paths.ranks.mkdir(parents=True, exist_ok=True)
        self._file = plain(str(paths.beats(node())), os.O_CREAT | os.O_WRONLY)
        self._at = int(os.environ.get("LOCAL_RANK", 0)) * _SLOT
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
        self._doing, self._step = "", None
        self._counts: dict[str, int] = {}
        self._moved = _moved_bytes()
        self._lock = threading.Lock()
        self.beat("starting")
        threading.Thread(target=_note_bytes, args=(weakref.ref(self),), daemon=True).start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Notes what the process does now; `step` optimizer steps are taken."""
        step = self._step if step is None else step
        with self._lock:
            if (doing, step) != (self._doing, self._step):
                self._doing, self._step, self._counts = doing, step, {}
            self._write()

    def count(self, what: str, more: int = 1) -> None:
        """Notes that the process goes on with what it does; as often as one likes.

        Args:
            what: What is counted: passes, rows, tensors, tokens.
            more: How many of them are done since the last time.
        """
        with self._lock:
            self._counts[what] = self._counts.get(what, 0) + more
            if time.monotonic() > self._last + _SAY_EVERY_S:
                self._write()

    def count_bytes(self) -> None:
        """Counts what the process has read and written, if that is more than it says of itself."""
        moved = _moved_bytes()
        if moved > self._moved + _NOTABLE:
            self.count("bytes", moved - self._moved)
            self._moved = moved

    def _write(self) -> None:
        self._last = time.monotonic()
        said = {"doing": self._doing, "step": self._step, "counts": self._counts, "time": time.time()}
        os.pwrite(self._file, json.dumps(self._who | said).encode()[:_SLOT].ljust(_SLOT), self._at)


def read_beats(file: Path) -> list[dict[str, Any]]:
    """What each process of a machine said last; nothing of one that has said nothing, or is saying it just now."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    beats = []
    for at in range(0, len(content), _SLOT):
        with suppress(ValueError):
            beats.append(json.loads(content[at : at + _SLOT]))
    return beats


def own_beat(paths: StagePaths, rank: int) -> dict[str, Any]:
    """What a process of this machine said last."""
    return next((beat for beat in read_beats(paths.beats(node())) if beat["rank"] == rank), {})


def _moved_bytes() -> int:
    """Bytes that the process has read from files and written to them; a process that waits moves none. 0 where the
    system does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    moved = dict(line.split(": ") for line in lines)
    return sum(int(moved[key]) for key in ("rchar", "wchar", "read_bytes"))  # the last: of files mapped into memory


def _note_bytes(of: weakref.ref[Heartbeat]) -> None:
    """Runs beside the process, which says nothing while it loads or saves, for as long as there is its heartbeat."""
    while (heartbeat := of()) is not None:
        heartbeat.count_bytes()
        del heartbeat
        time.sleep(_LOOK_EVERY_S)


class RehearsalHeartbeat:
    """Says what a process does of the rehearsal, in the file of the stage; its steps are none of the stage's."""

    def __init__(self, stage: Heartbeat):
        self._stage = stage

    def beat(self, doing: str, step: int | None = None) -> None:
        self._stage.beat(_REHEARSAL + doing)

    def count(self, what: str, more: int = 1) -> None:
        self._stage.count(what, more)


def ends_at_once(doing: str) -> bool:
    """Whether a request to stop ends what a process does without delay: there is nothing to save."""
    return doing.removeprefix(_REHEARSAL).startswith(_AT_FIRST)


def progress(beat: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a heartbeat is another once its process got on."""
    return beat["pid"], beat["doing"], beat["step"], beat["counts"]
