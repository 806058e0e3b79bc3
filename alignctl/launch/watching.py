"""The workers of a stage as the process that started those of one machine sees them. Torch-free."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignctl.monitor.heartbeat import ends_at_once, progress, read_beats
from alignctl.run.files import read_json
from alignctl.run.paths import StagePaths

_LOOK_EVERY_S = 1.0
_OTHERS_A_LOOK = 8  # machines besides this one: all of 64 in 8 s, and few of the files that a file system has to serve
_QUIET_S = 600  # that a slow disk may keep a process from saying anything while it imports and reads


class Workers:
    """Looks at what workers leave in a stage's folder: what they do (heartbeat.py) and why they ended.

    What was there before counts for nothing: several machines share the folder, and an earlier attempt may have left
    files in it. Those of this machine are looked at every second, those of others in turns. How long a worker has stood
    still is counted in looks, not by anybody's clock, so that a machine that slept, or one whose clock is wrong, makes
    no worker stuck.
    """

    def __init__(self, paths: StagePaths, node: int = 0):
        self._paths, self._own = paths, paths.beats(node)
        self._before = {file: _version(file) for file in paths.ranks.glob("*")}
        self._looked = time.monotonic()
        self._awake_s = 0.0
        self._turn = 0
        self._beats: dict[int, dict[str, Any]] = {}
        self._moved_at_s: dict[int, float] = {}  # by `_awake_s`
        self._failed_s = 0.0

    def beats(self) -> list[dict[str, Any]]:
        """What each worker of the attempt said last, on whatever machine it is."""
        return [beat for file in self._new(self._paths.beats("*")) for beat in read_beats(file)]

    def children_of(self, pid: int) -> list[int]:
        """Process ids of the workers that a process of this machine is or started."""
        beats = read_beats(self._own) if self._is_new(self._own) else []
        return [beat["pid"] for beat in beats if pid in (beat["pid"], beat["parent"])]

    def look(self) -> None:
        """Takes note of what has changed; to be called often."""
        now = time.monotonic()
        if now < self._looked + _LOOK_EVERY_S:
            return
        passed, self._looked = min(now - self._looked, 2 * _LOOK_EVERY_S), now
        self._awake_s += passed
        for file in [self._own, *self._others_in_turn()]:
            for beat in read_beats(file) if self._is_new(file) else []:
                rank = beat["rank"]
                if rank not in self._beats or progress(beat) != progress(self._beats[rank]):
                    self._moved_at_s[rank] = self._awake_s
                self._beats[rank] = beat
        self._failed_s += passed if self._failed_s or self._has_failed() else 0

    def stuck(self, timeout_s: float) -> bool:
        """Whether none has begun within that long, or none got on with what it does: before training they have longer,
        for a slow file system. One that is stuck stops the others soon. Also whether another machine found it so."""
        begins = not self._beats or any(ends_at_once(beat["doing"]) for beat in self._beats.values())
        still_s = self._awake_s - max(self._moved_at_s.values(), default=0.0)
        return still_s >= (max(timeout_s, _QUIET_S) if begins else timeout_s) or self._is_new(self._paths.stuck)

    def still_s(self, rank: int) -> float:
        """For how long a worker has not got on."""
        return self._awake_s - self._moved_at_s.get(rank, 0.0)

    def end_at_once(self) -> bool:
        """Whether a request to stop has to end all of them soon, because there is nothing to save yet."""
        return bool(self._beats) and all(ends_at_once(beat["doing"]) for beat in self._beats.values())

    def failed_for_s(self) -> float:
        """How long it has been known that a worker ended before its time, on whatever machine."""
        return self._failed_s

    def killed(self) -> tuple[int, int] | None:
        """Rank of a worker that a signal ended, and the signal, if there is one: the others fail because of it."""
        for file in self._new(self._paths.exit_codes("*")):
            for rank, code in (read_json(file) or {}).items():
                if code < 0:
                    return int(rank), -code
        return None

    def first_error(self) -> dict[str, Any] | None:
        """Why the first worker ended that did not end well: others follow from it, because they wait for one that is
        gone. That it was asked to stop is a reason, too."""
        errors = [error for file in self._new(self._paths.error("*")) if (error := read_json(file))]
        return min(errors, key=lambda error: error["time"], default=None)

    def _has_failed(self) -> bool:
        return bool(self._new(self._paths.exit_codes("*")) or self._new(self._paths.error("*")))

    def _others_in_turn(self) -> list[Path]:
        others = sorted(file for file in self._paths.ranks.glob(self._paths.beats("*").name) if file != self._own)
        at, self._turn = self._turn % max(len(others), 1), self._turn + _OTHERS_A_LOOK
        return (others[at:] + others[:at])[:_OTHERS_A_LOOK]

    def _new(self, pattern: Path) -> list[Path]:
        return [file for file in sorted(pattern.parent.glob(pattern.name)) if self._is_new(file)]

    def _is_new(self, file: Path) -> bool:
        return (version := _version(file)) is not None and version != self._before.get(file)


def _version(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return None


def send(pids: list[int], number: int) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
