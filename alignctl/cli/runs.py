"""`alignctl logs`, `cancel` and `resume`: runs that were started or submitted before. Torch-free."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from alignctl.cli.display import Display
from alignctl.cli.submit import submit_plans
from alignctl.cli.summary import print_summary, run_summary
from alignctl.cli.terminal import say_notice, visible
from alignctl.config.schema import RunSettings
from alignctl.errors import LaunchError, RequestError
from alignctl.launch.local import check_machine, run_plan
from alignctl.launch.queue import cancel_jobs, check_slurm_here
from alignctl.launch.slurm import refuse_if_queued
from alignctl.launch.status import statuses
from alignctl.plan.freeze import read_plan, refuse_moved, refuse_other_inputs, refuse_other_shares, refuse_other_version
from alignctl.run.owner import refuse_others
from alignctl.run.paths import RunPaths
from alignctl.run.state import is_done, is_held, locked, read_status, works_on, write_stage_state

_FOLLOW_S = 0.5
_ASK_EVERY_S = 5.0  # whether a stage goes on: SLURM has others to answer, too
_ALIVE = ("queued", "running")


def logs_command(run: Path, stage: str | None, rank: int | None, follow: bool) -> None:
    """Prints what a stage's job printed, or one of its processes in the last attempt."""
    plan = read_plan(RunPaths(run.resolve()))
    names = [one.config.name for one in plan.stages]
    if stage is not None and stage not in names:
        raise RequestError(f"the run has no stage `{stage}`", f"its stages are {', '.join(names)}")
    begun = [name for name in names if _log(plan.paths, name, rank).exists()]
    name = stage or (begun or names[:1])[-1]

    asked, alive = 0.0, follow

    def goes_on() -> bool:
        nonlocal asked, alive
        if alive and time.monotonic() > asked + _ASK_EVERY_S:
            (now,) = statuses([plan])
            asked, alive = time.monotonic(), next(one for one in now.stages if one.name == name).state in _ALIVE
        return alive

    while not (log := _log(plan.paths, name, rank)).exists():
        if not goes_on():
            raise RequestError(f"there is no {log} (yet)", "see `alignctl status`, or wait for it with `--follow`")
        time.sleep(_FOLLOW_S)
    for text in _texts(log, goes_on):
        click.echo(visible(text), nl=False)


def _log(paths: RunPaths, stage: str, rank: int | None) -> Path:
    """The log of a stage's job if nothing else is asked for, else that of a process of the last attempt."""
    job = read_status(paths)["stages"].get(stage, {}).get("job")
    folder = paths.stage(stage)
    alone = rank is not None or not job
    log = folder.rank_log(max(folder.last_attempt(), 1), rank or 0) if alone else Path(job["log"])
    place, root = log.resolve(), paths.root.resolve()
    logs = [root]  # and those of the point of a sweep that does the stage for this one, or begins the array it is in
    if place.is_relative_to(root.parent) and place != root.parent:
        other = RunPaths(root.parent / place.relative_to(root.parent).parts[0])
        logs += [other.stage(stage).job_log("").parent] if other.plan.is_file() else []
    if not any(place.is_relative_to(one) for one in logs) or (place.exists() and not place.is_file()):
        raise RequestError(f"{log} is no log of {root}, and is not shown", f"look at who wrote {paths.status}")
    return place


def _texts(log: Path, goes_on: Callable[[], bool]) -> Iterator[str]:
    with log.open(encoding="utf-8", errors="replace") as file:
        more = True
        while more:
            more = goes_on()  # asked before reading: nothing that is printed until then is missed
            while text := file.read(2**16):
                yield text
            if more:
                time.sleep(_FOLLOW_S)


def cancel_command(run: Path, trusted: bool) -> None:
    """Ends a run: its jobs, or the command that runs it on this machine. What is saved stays."""
    paths = RunPaths(run.resolve())
    refuse_others(paths.root, trusted, say_notice)
    (now,) = statuses([read_plan(paths)])
    alive = [stage for stage in now.stages if stage.job and stage.state in _ALIVE and not stage.shared]
    if alive:
        cancel_jobs([stage.job for stage in alive if stage.job])
        for stage in alive:
            if stage.state == "queued":
                write_stage_state(paths, stage.name, "cancelled")
        listed = ", ".join(f"{stage.name} (job {stage.job})" for stage in alive)
        click.echo(f"cancelled: {listed}\nhint: `alignctl resume {shlex.quote(str(run))}` goes on", err=True)
    elif is_held(paths):
        status = read_status(paths)
        if status.get("host") != socket.gethostname():
            raise LaunchError(f"{paths.root} is at work on {status.get('host')}", "give the same command there")
        if not works_on(paths, pid := status.get("pid", 0)):
            raise LaunchError(
                f"process {pid}, which {paths.status} names, is not the alignctl that works on it",
                "stop it with Ctrl-C where it was started",
            )
        os.kill(pid, signal.SIGTERM)
        click.echo("asked to save and to stop", err=True)
    else:
        raise LaunchError(f"{paths.root} is not at work: {now.state}", "there is nothing to cancel")


def resume_command(run: Path, trusted: bool) -> None:
    """Goes on with a run as it was frozen: submits what is not done, or runs it on this machine."""
    paths = RunPaths(run.resolve())
    refuse_others(paths.root, trusted, say_notice)
    plan = read_plan(paths)
    if all(is_done(paths.stage(stage.config.name)) for stage in plan.stages):
        click.echo(f"already finished: {plan.run_dir}", err=True)
        return
    refuse_moved(paths)
    refuse_other_version(paths)
    refuse_other_inputs(plan)
    refuse_other_shares(plan)
    refuse_if_queued(plan)
    if plan.stages[0].config.launcher.type == "slurm":
        check_slurm_here()
        with locked(paths):
            submit_plans([plan])
        return
    check_machine(plan)
    with locked(paths), Display(RunSettings.log_every) as display:
        display.say(f"{plan.recipe} in {plan.run_dir}")
        run_plan(plan, display)
    print_summary(run_summary(plan))
