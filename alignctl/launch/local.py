"""Runs the stages of a plan on this machine, one process each, one after the other. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from alignctl.config.schema import QUANTIZED
from alignctl.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_LAUNCH,
    EXIT_REQUEST,
    EXIT_STOPPED,
    AlignctlError,
    Interrupted,
    LaunchError,
    Problem,
    RequestError,
    Stopped,
)
from alignctl.plan.plan import RunPlan, StagePlan
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json
from alignctl.run.paths import StagePaths
from alignctl.run.state import State, is_done, write_stage_state, write_state

_POLL_S = 0.1
_LOG_TAIL = 25  # lines, or all of the last traceback
_STATES: dict[int, State] = {EXIT_DONE: "done", EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "interrupted"}


class Watcher(Protocol):
    """Whoever shows what happens."""

    def started(self, stage: StagePlan, step: int | None) -> None:
        """A stage starts, or continues after `step` optimizer steps."""

    def progress(self, stage: StagePlan, progress: dict[str, Any]) -> None:
        """What the stage is doing now: the content of its progress.json."""

    def finished(self, stage: StagePlan, seconds: float) -> None:
        """A stage is done."""


def check_machine(plan: RunPlan) -> None:
    """Refuses what this machine cannot do, before anything is loaded.

    Raises:
        LaunchError: A stage wants 16-bit training or 4-bit weights, and there is no GPU.
    """
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return
    for stage in plan.stages:
        trainer, name = stage.config.trainer, stage.config.name
        if trainer.get("use_cpu") or is_done(plan.paths.stage(name)):
            continue
        kind = stage.config.peft.get("type")
        wants = {f"{name}.{key}=true": f"{name}.{key}=false" for key in ("bf16", "fp16") if trainer.get(key)}
        wants |= {f"peft.type={kind}": "peft=lora"} if kind in QUANTIZED else {}
        for setting, instead in wants.items():
            raise LaunchError(
                f"`{setting}` needs a GPU, and this machine shows none",
                f"run it where there is one, see the plan with `--dry-run`, or set `{instead}`",
            )


def run_plan(plan: RunPlan, watcher: Watcher) -> None:
    """Runs every stage that is not done; a stage that was begun continues from its newest complete checkpoint.

    Raises:
        Stopped, Interrupted: A stop was requested (SIGINT or SIGTERM to this process).
        AlignctlError: A stage failed.
    """
    for stage in plan.stages:
        if not is_done(plan.paths.stage(stage.config.name)):
            _run_stage(plan, stage, watcher)
    write_state(plan.paths, "done")


def _run_stage(plan: RunPlan, stage: StagePlan, watcher: Watcher) -> None:
    name = stage.config.name
    paths = plan.paths.stage(name)
    attempt = paths.new_attempt()
    paths.logs(attempt).mkdir(parents=True)
    paths.error.unlink(missing_ok=True)
    paths.progress.unlink(missing_ok=True)
    write_stage_state(plan.paths, name, "running", attempts=attempt)
    checkpoint = newest_checkpoint(paths.checkpoints)
    watcher.started(stage, checkpoint.step if checkpoint else None)
    began = time.monotonic()
    log = paths.logs(attempt) / "rank_0.log"
    code = _wait(stage, paths, log, watcher)
    seconds = time.monotonic() - began
    write_stage_state(plan.paths, name, _STATES.get(code, "failed"), seconds=round(seconds, 1))
    if code != EXIT_DONE:
        raise _failure(name, code, paths, log)
    watcher.finished(stage, seconds)


def _wait(stage: StagePlan, paths: StagePaths, log: Path, watcher: Watcher) -> int:
    """Starts the worker of a stage and waits for it, passing signals on. Returns its exit code."""
    with log.open("wb") as output:
        worker = subprocess.Popen(
            stage.command,
            env=os.environ | stage.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it through us alone, once
        )
    seen = None
    with _passed_on(worker) as received:
        while worker.poll() is None:
            progress = read_json(paths.progress)
            if progress and progress != seen:
                watcher.progress(stage, progress)
                seen = progress
            time.sleep(_POLL_S)
    if (progress := read_json(paths.progress)) and progress != seen:
        watcher.progress(stage, progress)
    if received and worker.returncode in (-signal.SIGINT, -signal.SIGTERM):  # before it had handlers of its own
        return EXIT_STOPPED if newest_checkpoint(paths.checkpoints) else EXIT_INTERRUPTED
    return worker.returncode


@contextmanager
def _passed_on(worker: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Sends SIGINT and SIGTERM on to the worker: the first asks it to save, the second to stop, the third kills it."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        worker.send_signal(signal.SIGKILL if len(received) > 2 else number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(name: str, code: int, paths: StagePaths, log: Path) -> AlignctlError:
    """What to raise for a worker that did not end well."""
    again = "run the same command again to continue"
    told = read_json(paths.error)
    if code == EXIT_STOPPED:
        checkpoint = newest_checkpoint(paths.checkpoints)
        return Stopped(f"stage `{name}`, step {checkpoint.step if checkpoint else 0} is saved", again)
    if code == EXIT_INTERRUPTED:
        return Interrupted(f"stage `{name}`, before it had anything to save", again)
    if told:
        kind = {EXIT_REQUEST: RequestError, EXIT_LAUNCH: LaunchError}.get(code, AlignctlError)
        first, *others = (Problem(**problem) for problem in told["problems"])
        error = kind(f"stage `{name}`: {first.message}", first.hint)
        error.problems += tuple(others)
        return error
    tail = _end_of(log)
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return AlignctlError(f"stage `{name}` {how}; the end of {log}:\n\n{tail}\n", again if code < 0 else None)


def _end_of(log: Path) -> str:
    """The last traceback of a log, else its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback (")), default=len(lines))
    return "\n".join(lines[min(start, max(len(lines) - _LOG_TAIL, 0)) :])
