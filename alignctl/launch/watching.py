"""The workers of a stage as the process that started those of one machine sees them. Torch-free."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignctl.monitor.heartbeat import ends_at_once, is_slow, without_work
from alignctl.run.files import read_json
from alignctl.run.paths import StagePaths

_LOOK_EVERY_S = 1.0
_SLOW = 10  # times the time without a step or another phase, for what may take long
_QUIET_S = 600  # that a slow disk may keep a process from working while it imports, reads or saves


class Workers:
    """Looks at what workers leave in a stage's folder: what they do (heartbeat.py) and why they ended.

    What was there before counts for nothing: several machines share the folder, and an earlier attempt may have left
    files in it. How long a worker has said nothing is counted in looks at its file, not by anybody's clock, so that a
    machine that slept, or one whose clock is wrong, makes no worker stuck.
    """

    def __init__(self, paths: StagePaths):
        self._paths = paths
        self._before = {file: _version(file) for file in paths.ranks.glob("*.json")}
        self._looked = time.monotonic()
        self._beats: dict[Path, dict[str, Any]] = {}
        self._silent_s: dict[Path, float] = {}
        self._still_s: dict[Path, float] = {}  # as long as it does the same, whether it works or not
        self._unseen_s = 0.0  # until the first says something
        self._failed_s = 0.0

    def beats(self) -> list[dict[str, Any]]:
        """What each worker of the attempt said last, on whatever machine it is."""
        return [beat for file in self._new(self._paths.rank("*")) if (beat := read_json(file)) and "doing" in beat]

    def children_of(self, pid: int) -> list[int]:
        """Process ids of the workers that a process is or started."""
        return [beat["pid"] for beat in self.beats() if pid in (beat["pid"], beat["parent"])]

    def look(self) -> None:
        """Takes note of what has changed; to be called often."""
        now = time.monotonic()
        if now < self._looked + _LOOK_EVERY_S:
            return
        passed, self._looked = min(now - self._looked, 2 * _LOOK_EVERY_S), now
        for file in self._new(self._paths.rank("*")):
            beat = read_json(file)
            if beat and "doing" in beat:
                before = self._beats.get(file, {})
                self._silent_s[file] = 0.0 if beat != before else self._silent_s[file] + passed
                moved = without_work(beat) != without_work(before)
                self._still_s[file] = 0.0 if moved else self._still_s[file] + passed
                self._beats[file] = beat
        self._unseen_s = 0.0 if self._beats else self._unseen_s + passed
        self._failed_s += passed if self._has_failed() else 0

    def stuck(self, timeout_s: float) -> bool:
        """Whether none has begun within that long, or none has done any work, or none went on with what it does: for
        that they have longer where it may take long. One that is stuck stops the others soon."""
        quiet_s = max(timeout_s, _QUIET_S)
        if not self._beats:
            return self._unseen_s >= quiet_s
        slow = any(is_slow(beat["doing"]) for beat in self._beats.values())
        return min(self._silent_s.values()) >= (quiet_s if slow else timeout_s) or min(
            self._still_s.values()
        ) >= timeout_s * (_SLOW if slow else 1)

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

    def _new(self, pattern: Path) -> list[Path]:
        files = sorted(pattern.parent.glob(pattern.name))
        return [file for file in files if _version(file) != self._before.get(file)]


def _version(file: Path) -> int | None:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return None


def send(pids: list[int], number: int) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
