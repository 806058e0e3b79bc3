"""What state a run is in: status.json, and the lock that keeps two processes from one run. Torch-free."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from alignctl.errors import LaunchError
from alignctl.run.files import read_record, write_json
from alignctl.run.forms import RESULT, STATUS
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.products import rows_changed

State = Literal["waiting", "queued", "running", "done", "failed", "stopped", "interrupted", "cancelled"]


def read_status(paths: RunPaths) -> dict[str, Any]:
    """The status of a run: {state, host, pid, updated, stages: {name: {state, attempts, seconds, error, job}}}."""
    return read_record(paths.status, STATUS) or {"state": "waiting", "stages": {}}


def is_done(stage: StagePaths) -> bool:
    """Whether a stage has its result and what it makes, of the rows of an earlier stage as they are now."""
    result = read_record(stage.result, RESULT)
    if result is None:
        return False
    alone = result.get("product") == "adapter"
    made = stage.adapter.exists() if alone else stage.model.exists() or stage.rows.root.exists()
    return made and not rows_changed(stage)


def write_state(paths: RunPaths, state: State) -> None:
    """Notes the state of a run."""
    _update(paths, state)


def write_stage_state(paths: RunPaths, stage: str, state: State, **facts: Any) -> None:
    """Notes the state of a stage, with facts about it; the run is in the same state until it is done."""
    status = read_status(paths)
    stages = status["stages"] | {stage: status["stages"].get(stage, {}) | {"state": state} | facts}
    _update(paths, "running" if state == "done" else state, stages=stages)


def _update(paths: RunPaths, state: State, **facts: Any) -> None:
    now = {
        "state": state,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(paths.status, read_status(paths) | now | facts)


@contextmanager
def locked(paths: RunPaths) -> Iterator[None]:
    """Holds a run for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        LaunchError: Another process holds it.
    """
    paths.make_root()
    with Path(paths.lock).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(
                f"another alignctl is working on {paths.root}", "wait for it, stop it, or give another `run_dir`"
            ) from error
        except OSError as error:
            raise LaunchError(
                f"cannot lock {paths.lock}: {error.strerror}",
                "give a `run_dir` on a file system that has locks (flock)",
            ) from error
        yield


def is_held(paths: RunPaths) -> bool:
    """Whether a process on this machine works on a run."""
    with suppress(OSError), Path(paths.lock).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
