"""Runs the stages of a plan on this machine, one after the other, each in one process or several. Torch-free."""

from __future__ import annotations

import dataclasses
import errno
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
from alignctl.config.stages import StageConfig
from alignctl.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, AlignctlError, LaunchError
from alignctl.launch.beforehand import is_due, look_beforehand
from alignctl.launch.environment import own_environment
from alignctl.launch.failures import ended, failure, not_begun, stopped, stuck
from alignctl.launch.watching import Workers, send
from alignctl.monitor.heartbeat import read_beats
from alignctl.monitor.stopping import SAME_REQUEST_S, handled
from alignctl.plan.freeze import refuse_anothers_stage
from alignctl.plan.plan import RunPlan, StagePlan, workers_command
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json, write_text
from alignctl.run.owner import plain, take_away
from alignctl.run.paths import StagePaths
from alignctl.run.process import NODE, PARENT
from alignctl.run.products import begin_anew, check_models, take_rows, unread_models
from alignctl.run.state import State, is_done, write_stage_state, write_state

_POLL_S = 0.1
_SHOW_EVERY_S = 0.25
_ANSWER_S = 1  # that a process takes to write down where it is
_PATIENCE_S = 10  # from the second request to stop until everything is killed, from the first before training
_LAST_WORDS_S = 15  # from the first worker's end until everything is killed; torchrun waits 10 for the others
_FIRST_S = 15 * 60  # how long the first of several machines may take to begin; torchrun waits as long
# Settings that CPUs cannot do.
_ON_GPUS = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "activation_offloading")
_READ_POLL_S = 2.0  # of a file system that many machines share
_GONE_EVERY_S = 1.0  # it is looked whether the folder is there
_GONE, _UNKNOWN = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN), (-1, -1)
_STATES: dict[int, State] = {EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "interrupted"}


class FolderGone(AlignctlError):
    """A run directory was taken away from a run; nothing can be noted in it."""


class Folder:
    """The folder of a stage, as it was when the stage began."""

    def __init__(self, paths: StagePaths):
        self._root, self._was = paths.root, _which(paths.root)
        self._looked = time.monotonic()

    def look(self) -> None:
        """Looks whether it is still there; to be called often.

        Raises:
            FolderGone: It is not.
        """
        if time.monotonic() > self._looked + _GONE_EVERY_S:
            self.check()
            self._looked = time.monotonic()

    def check(self) -> None:
        """Looks at once."""
        if _which(self._root) not in (self._was, _UNKNOWN):
            raise FolderGone(
                f"{self._root} was removed, renamed or unmounted while the stage was at work, so it was ended",
                "put the run directory back as it was, and give the same command again: it continues from the newest "
                "checkpoint",
            )


def _which(folder: Path) -> tuple[int, int] | None:
    """File system and number of a folder; None where there is none, and `_UNKNOWN` where the system does not say."""
    try:
        found = folder.stat()
    except OSError as error:
        return None if error.errno in _GONE else _UNKNOWN
    return found.st_dev, found.st_ino


class Watcher(Protocol):
    """Whoever shows what happens."""

    def say(self, text: str) -> None:
        """Something people should know."""

    def started(self, stage: StagePlan, step: int | None) -> None:
        """A stage starts, or continues after `step` optimizer steps."""

    def progress(self, stage: StagePlan, progress: dict[str, Any]) -> None:
        """What the stage is doing now: the content of its progress.json."""

    def finished(self, stage: StagePlan, seconds: float) -> None:
        """A stage is done."""


def check_machine(plan: RunPlan) -> None:
    """Refuses what this machine cannot do, before anything is loaded.

    Raises:
        LaunchError: A stage wants GPUs, 16-bit training or 4-bit weights, and there are not enough of them.
    """
    refuse_four_bits_here(plan)
    gpus = _gpus_here()
    for stage in plan.stages:
        trainer, name = stage.config.trainer, stage.config.name
        if is_done(plan.paths.stage(name)):
            continue
        wanted = stage.config.launcher.gpus_per_node or 0
        if wanted > gpus and not Path("/dev/kfd").exists():  # whose cards have no files to count
            raise LaunchError(
                f"`launcher.gpus_per_node={wanted}`, and this machine shows {gpus or 'none'}",
                "run it where they are, see the plan with `--dry-run`, or set `launcher.processes=2` to try it on CPUs",
            )
        if _has_gpu(stage.config):
            continue
        wants = {f"{name}.{key}=true": f"{name}.{key}=false" for key in _ON_GPUS if trainer.get(key)}
        if stage.config.model.attn_implementation == "flex_attention":
            wants["model.attn_implementation=flex_attention"] = "model.attn_implementation=null"
        for setting, instead in wants.items():
            raise LaunchError(
                f"`{setting}` needs a GPU, and this machine shows none",
                f"run it where there is one, see the plan with `--dry-run`, or set `{instead}`",
            )


def refuse_four_bits_here(plan: RunPlan) -> None:
    """Refuses weights in 4 bits where a stage runs on this machine and finds no GPU. A dry run refuses them, too: the
    group is chosen for a machine that is at hand, and what it does on CPUs nobody waits for.

    Raises:
        LaunchError: There are such.
    """
    for stage in plan.stages:
        config, kind = stage.config, stage.config.peft.get("type")
        here = config.launcher.type == "local" and not is_done(plan.paths.stage(config.name))
        if here and kind in QUANTIZED and not _has_gpu(config):
            raise LaunchError(
                f"`peft.type={kind}` of `{config.name}` needs a GPU, and this machine shows none",
                f"run it where there is one, set `peft=lora`, or try it on CPUs with `{config.name}.use_cpu=true`",
            )


def _has_gpu(stage: StageConfig) -> bool:
    """Whether a stage computes on a GPU of this machine, or is not meant to."""
    return bool(stage.trainer.get("use_cpu") or (_gpus_here() and not stage.launcher.processes))


def _gpus_here() -> int:
    """GPUs by their device files; of AMD's, whose cards have none of their own, one for all."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or (1 if Path("/dev/kfd").exists() else 0)


def wait_for_first(plan: RunPlan) -> None:
    """Waits until the first of several machines has begun and looked at the rows, for one that only helps and so writes
    nothing.

    Raises:
        LaunchError: It has not.
    """
    until = time.monotonic() + _FIRST_S
    while not plan.paths.plan.exists() or is_due(plan):
        if time.monotonic() > until:
            raise LaunchError(
                f"the machine with `launcher.node_rank=0` has not begun: {plan.run_dir} has no {plan.paths.plan.name}, "
                "or the rows are still looked at",
                "start the same command there, with a `run_dir` that both see",
            )
        time.sleep(_POLL_S)


def run_plan(plan: RunPlan, watcher: Watcher) -> None:
    """Looks at the rows of all stages, and runs every stage that is not done; one that was begun continues from its
    newest complete checkpoint.

    Raises:
        Stopped, Interrupted: A stop was requested (a signal that asks this process to).
        AlignctlError: A stage failed.
    """
    if all(stage.config.launcher.node_rank == 0 for stage in plan.stages):
        look_beforehand(plan, watcher)
    for stage in plan.stages:
        if not is_done(plan.paths.stage(stage.config.name)):
            refuse_anothers_stage(plan, stage.config.name)
            run_stage(plan, stage, watcher)
    if all(stage.config.launcher.node_rank == 0 for stage in plan.stages):
        write_state(plan.paths, "done")


def run_stage(plan: RunPlan, stage: StagePlan, watcher: Watcher) -> None:
    """Runs this machine's part of a stage: of several machines the first keeps the books.

    Raises:
        Stopped, Interrupted, AlignctlError: As `run_plan`.
    """
    (_lead if stage.config.launcher.node_rank == 0 else _help)(plan, stage, watcher)


def part_of_job(stage: StagePlan, run_dir: str, node_rank: int, meet: str) -> StagePlan:
    """A stage of a SLURM job as one of its machines runs it.

    Args:
        meet: HOST:PORT where the machines find each other.
    """
    launcher = dataclasses.replace(stage.config.launcher, node_rank=node_rank, rdzv_endpoint=meet)
    config = dataclasses.replace(stage.config, launcher=launcher)
    return dataclasses.replace(stage, config=config, command=workers_command(config, Path(run_dir)))


def _begin_anew_after(plan: RunPlan, stage: StagePlan, watcher: Watcher) -> None:
    """Where a stage begins anew, so do those that stand on what it made."""
    changed = {stage.config.name}
    for later in plan.stages:
        config = later.config
        if changed & {config.start_from, config.data.rows_from, *config.roles_from.values()}:
            changed.add(config.name)
            begin_anew(plan.paths.stage(config.name))
    others = ", ".join(f"`{name}`" for name in sorted(changed - {stage.config.name}))
    watcher.say(
        f"{stage.config.name}: the rows of `{stage.config.data.rows_from}` are others now, so it begins anew"
        + (f", and after it {others}" if others else "")
    )


def _lead(plan: RunPlan, stage: StagePlan, watcher: Watcher) -> None:
    name = stage.config.name
    paths = plan.paths.stage(name)
    attempt = paths.last_attempt() + 1
    paths.logs(attempt).mkdir(parents=True)
    take_away(paths.ranks)
    paths.progress.unlink(missing_ok=True)
    write_stage_state(plan.paths, name, "running", attempts=attempt, error=None)
    began = time.monotonic()
    alone = stage.config.distributed.type == "none"
    log = paths.rank_log(attempt, 0) if alone else paths.launch_log(attempt)
    try:
        with _stopping(name, paths):
            check_models(stage.config, paths, watcher.say)
            if take_rows(stage.config, paths):
                _begin_anew_after(plan, stage, watcher)
        checkpoint = newest_checkpoint(paths.checkpoints)
        watcher.started(stage, checkpoint.step if checkpoint else None)
        _wait(stage, paths, log, watcher)
    except FolderGone:
        raise
    except BaseException as error:
        seconds = round(time.monotonic() - began, 1)
        state = _STATES.get(error.exit_code, "failed") if isinstance(error, AlignctlError) else "failed"
        write_stage_state(plan.paths, name, state, seconds=seconds, error=str(error) if state == "failed" else None)
        raise
    seconds = time.monotonic() - began
    write_stage_state(plan.paths, name, "done", seconds=round(seconds, 1))
    watcher.finished(stage, seconds)


def _help(plan: RunPlan, stage: StagePlan, watcher: Watcher) -> None:
    """Runs the part of a stage that belongs to this machine, which is not the first: that one keeps the books. The
    workers wait for those of the first before they read anything."""
    paths = plan.paths.stage(stage.config.name)
    with _stopping(stage.config.name, paths):
        if not _first_goes_on(stage, paths):
            return
    log = paths.node_log(stage.config.launcher.node_rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    watcher.started(stage, None)
    began = time.monotonic()
    _wait(stage, paths, log, watcher)
    watcher.finished(stage, time.monotonic() - began)


def _first_goes_on(stage: StagePlan, paths: StagePaths) -> bool:
    """Waits while the first machine reads models of earlier stages, before workers wait for each other, which they do
    only for so long; whether it goes on, and did not end by itself.

    Raises:
        LaunchError: It does not get on.
    """
    left, until = unread_models(stage.config, paths), time.monotonic() + _FIRST_S
    while left and not paths.ended(0).exists():
        if time.monotonic() > until:
            raise LaunchError(
                f"the machine with `launcher.node_rank=0` has not read {left[0]} within {_FIRST_S:,} s",
                "look at what it says, and start the same command on all machines again",
            )
        time.sleep(_READ_POLL_S)
        before, left = left, unread_models(stage.config, paths)
        if left != before:
            until = time.monotonic() + _FIRST_S
    return not left


def _wait(stage: StagePlan, paths: StagePaths, log: Path, watcher: Watcher) -> None:
    """Starts the process of a stage and waits for it, passing signals on.

    Raises:
        AlignctlError: It did not end well, or was stopped.
    """
    node = stage.config.launcher.node_rank
    workers, folder = Workers(paths, node), Folder(paths)
    environ = own_environment(os.environ, in_job=stage.config.launcher.type == "slurm")
    with open(log, "ab", opener=plain) as output:
        process = subprocess.Popen(
            stage.command,
            env=environ | stage.environment | {PARENT: str(os.getpid()), NODE: str(node)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it through us alone, once
        )
    seen, shown_s, by_us = None, 0.0, False
    with _passed_on(process, workers) as received:
        while process.poll() is None:
            if time.monotonic() > shown_s + _SHOW_EVERY_S:
                shown_s = time.monotonic()
                seen = _show(stage, paths, watcher, seen)
            workers.look()
            patient_since = received[1:2] or (received[:1] if workers.end_at_once() else [])
            out_of_patience = patient_since and time.monotonic() > patient_since[0] + _PATIENCE_S
            if out_of_patience or workers.failed_for_s() > _LAST_WORDS_S:
                process.kill()
                by_us = True
            if workers.stuck(stage.config.launcher.stall_timeout):
                raise _end_stuck(stage, paths, workers, process, log)
            try:
                folder.look()
            except FolderGone:
                process.kill()  # the workers die with it
                process.wait()
                raise
            time.sleep(_POLL_S)
    folder.check()
    _show(stage, paths, watcher, seen)
    code = ended(process.returncode, workers, bool(received), paths)
    if code != EXIT_DONE:
        if stage.config.launcher.nodes > 1:
            _tell_others(stage, paths)
        raise failure(stage.config.name, code, workers, paths, log, by_us)


def _show(stage: StagePlan, paths: StagePaths, watcher: Watcher, seen: Any) -> Any:
    """Shows what the stage is doing now if that is not what was seen before; returns it."""
    progress = read_json(paths.progress)
    if progress and "step" not in progress:
        beats = read_beats(paths.beats(stage.config.launcher.node_rank))
        progress["counts"] = beats[0]["counts"] if beats else {}
    if progress and progress != seen:
        watcher.progress(stage, progress)
    return progress or seen


def _tell_others(stage: StagePlan, paths: StagePaths) -> None:
    """Has the other machines end their part; torchrun has done it where it could."""
    codes = paths.exit_codes(stage.config.launcher.node_rank)
    if not codes.exists():
        write_json(codes, {})


@contextmanager
def _stopping(name: str, paths: StagePaths) -> Iterator[None]:
    """Ends on a request to stop what is done before there are workers.

    Raises:
        Stopped, Interrupted: There was one.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise stopped(name, EXIT_STOPPED if newest_checkpoint(paths.checkpoints) else EXIT_INTERRUPTED, paths)

    with handled(stop):
        yield


@contextmanager
def _passed_on(process: subprocess.Popen[bytes], workers: Workers) -> Iterator[list[float]]:
    """Passes requests to stop on to the workers: the first asks them to save, the second to stop, the third kills; so
    does the first before there are any.

    Yields when they came, by the monotonic clock.
    """
    received: list[float] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now < received[-1] + SAME_REQUEST_S:
            return
        received.append(now)
        pids = workers.children_of(process.pid)
        if pids and len(received) < 3:
            send(pids, number)
        else:
            process.kill()

    with handled(pass_on):
        yield received


def _end_stuck(
    stage: StagePlan, paths: StagePaths, workers: Workers, process: subprocess.Popen[bytes], log: Path
) -> Exception:
    """Ends a stage that is stuck, after its workers wrote down where they are: the other machines are told to ask
    theirs, because the one to blame may be there."""
    several = stage.config.launcher.nodes > 1
    if several:
        write_text(paths.stuck, "")
    asked = workers.children_of(process.pid)
    send(asked, signal.SIGUSR2)
    time.sleep(_ANSWER_S * (3 if several else 1))
    process.kill()  # the workers die with it
    process.wait()
    if several:
        _tell_others(stage, paths)
    if not workers.beats():
        return not_begun(stage.config.name, stage.config.launcher.stall_timeout, log)
    return stuck(stage.config.name, workers, asked, paths)
