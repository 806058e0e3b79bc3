"""What state a run is in: status.json, and the lock that keeps two processes from one run. Torch-free."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from alignctl.errors import LaunchError, RequestError
from alignctl.run.files import read_record, write_json
from alignctl.run.forms import RESULT, STATUS
from alignctl.run.owner import plain
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.products import rows_changed

_JOB = re.compile(r"[0-9]+(_[0-9]+)?", re.ASCII)
_HOLD = fcntl.LOCK_EX | fcntl.LOCK_NB
State = Literal["waiting", "queued", "running", "done", "failed", "stopped", "interrupted", "cancelled"]


def read_status(paths: RunPaths) -> dict[str, Any]:
    """The status of a run: {state, host, pid, updated, stages: {name: {state, attempts, seconds, error, job}}}.

    Raises:
        RequestError: It is damaged.
    """
    status = read_record(paths.status, STATUS) or {"state": "waiting", "stages": {}}
    jobs = [stage["job"]["id"] for stage in status["stages"].values() if stage.get("job")]
    for job in jobs:
        if not _JOB.fullmatch(job):  # they are given to SLURM's commands
            raise RequestError(f"{paths.status} is damaged: `{job}` is no number of a job", "put it back as it was")
    return status


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
    """Holds a run for this process; the system lets go of it when the process ends, however it ends. The folder is held
    beside its lock: that may be removed meanwhile, and another put in its place.

    Raises:
        LaunchError: Another process holds it.
    """
    paths.make_root()
    with ExitStack() as opened:
        try:
            fcntl.flock(opened.enter_context(open(paths.lock, "a", opener=plain)), _HOLD)
            if _is_taken(opened.enter_context(_opened(paths.root))):
                raise BlockingIOError
        except BlockingIOError as error:
            raise LaunchError(
                f"another alignctl is working on {paths.root}", "wait for it, stop it, or give another `run_dir`"
            ) from error
        except OSError as error:
            raise LaunchError(
                f"cannot lock {paths.lock}: {error.strerror}",
                "give a `run_dir` that you may write to, on a file system that has locks (flock)",
            ) from error
        yield


def is_held(paths: RunPaths) -> bool:
    """Whether a process works on a run: on this machine, or on another where its locks are seen from here."""
    with ExitStack() as opened:
        found: list[Any] = []
        with suppress(OSError):
            found.append(opened.enter_context(_opened(paths.root)))
        with suppress(OSError, LaunchError):
            found.append(opened.enter_context(open(paths.lock, "r+", opener=plain)))  # NFS has none of what is read
        return any(map(_is_taken, found))


def works_on(paths: RunPaths, pid: int) -> bool:
    """Whether a process is an alignctl of this user that holds a run: the system is asked, and not the files of the
    run, which others may have written, and which may be older than a process that has the number now."""
    process = Path("/proc", str(pid))
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
        holds = any(_is_same(one, paths.root) for one in (process / "fd").iterdir())
    except OSError:
        return False
    return holds and any(b"alignctl" in word for word in command)


def _is_same(opened: Path, folder: Path) -> bool:
    """Whether a process has a folder open; it may close what it has at any moment."""
    with suppress(OSError):
        return opened.samefile(folder)
    return False


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_taken(opened: Any) -> bool:
    """Whether another process holds a file or a folder; else this one does from now on, where there are such locks: NFS
    has none of folders."""
    try:
        fcntl.flock(opened, _HOLD)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
