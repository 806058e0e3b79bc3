"""`alignctl status`: what runs are doing. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from alignctl.cli.display import duration
from alignctl.cli.summary import print_comparison, print_measured, run_summary
from alignctl.cli.terminal import say_notice, visible
from alignctl.cli.train import RUNS
from alignctl.errors import RequestError
from alignctl.launch.status import RunStatus, StageStatus, read_run, statuses
from alignctl.plan.plan import RunPlan
from alignctl.run.paths import PLAN, RunPaths

_OF_A_STAGE = ("job", "step", "loss", "left", "")
_MEASURED = ("before", "after", "win_rate", "certainty", "advice")  # of a stage


def status_command(run_dirs: Sequence[Path], every: bool, as_json: bool) -> None:
    """Of the runs that are named, every stage; of all below runs/, the stage each is at."""
    if every == bool(run_dirs):
        raise RequestError("name runs, or all of them", "`alignctl status RUN` or `alignctl status --all`")
    below = {run: _runs_in(run) for run in run_dirs}
    folders = [one for run in run_dirs for one in below[run] or [run.resolve()]]
    if every:
        folders = sorted(plan.parent for plan in RUNS.resolve().glob(f"**/{PLAN}"))
    several = every or any(below.values())
    plans = [plan for folder in folders if (plan := _readable(folder, several))]
    found = statuses(plans)
    if as_json:
        described = [run.to_dict() if every else _described(run, plan) for run, plan in zip(found, plans, strict=True)]
        click.echo(json.dumps(described[0] if len(run_dirs) == 1 and not below[run_dirs[0]] else described, indent=2))
    elif every:
        _print_all(found)
    elif len(run_dirs) == 1 and below[run_dirs[0]]:
        _print_all(found)
        _print_points(found, plans)
    else:
        for run, plan in zip(found, plans, strict=True):
            _print_run(run)
            print_measured(run_summary(plan), Console(highlight=False, markup=False))


def _runs_in(folder: Path) -> list[Path]:
    """The points of a sweep, or other runs that stand beside each other in a folder; none where it is a run itself."""
    if (folder / PLAN).exists():
        return []
    return sorted(plan.parent.resolve() for plan in folder.glob(f"*/{PLAN}"))


def _readable(folder: Path, several: bool) -> RunPlan | None:
    """The plan of a run; of several, one that cannot be read is named and left out.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        plan = read_run(RunPaths(folder))
        run_summary(plan)
    except RequestError as error:
        if not several:
            raise
        say_notice(f"{folder} is skipped: {error.problems[0].message}")
        return None
    return plan


def _print_points(found: Sequence[RunStatus], plans: Sequence[RunPlan]) -> None:
    """Compares those that are done."""
    done = [plan for run, plan in zip(found, plans, strict=True) if run.state == "done"]
    if done:
        print_comparison([(plan.paths.root.name, run_summary(plan)) for plan in done])


def _described(run: RunStatus, plan: RunPlan) -> dict[str, Any]:
    """What a run is doing, and what its finished stages measured."""
    described, measured = run.to_dict(), run_summary(plan)["stages"]
    for name, stage in described["stages"].items():
        stage["measured"] = {key: measured[name][key] for key in _MEASURED if key in measured[name]}
    return described


def _print_run(run: RunStatus) -> None:
    click.echo(visible(f"{run.recipe} in {run.run_dir}: {run.state}"))
    _print_table(("stage", "state", *_OF_A_STAGE), [[stage.name, stage.state, *_facts(stage)] for stage in run.stages])
    for stage in run.stages:
        if stage.error:
            click.echo(f"\n{visible(stage.error)}")


def _print_all(found: Sequence[RunStatus]) -> None:
    if not found:
        click.echo(f"no runs below {RUNS}/")
        return
    rows = [[os.path.relpath(run.run_dir), run.state, run.current.name, *_facts(run.current)] for run in found]
    _print_table(("run", "state", "stage", *_OF_A_STAGE), rows)


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, heading in enumerate(headings):
        free = number in (0, len(headings) - 1)  # names and notes; the others are a word each
        table.add_column(heading, overflow="fold", no_wrap=not free)
    for row in rows:
        table.add_row(*map(visible, row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width of its own
    console.print(table)


def _facts(stage: StageStatus) -> list[str]:
    """Job, step, loss, time until it is done and until its job's limit, and what else there is to say."""
    step = f"{stage.step}/{stage.max_steps}" if stage.step is not None else ""
    loss = f"{stage.metrics['loss']:.4g}" if stage.metrics.get("loss") is not None else ""
    left = [duration(stage.seconds_left)] if stage.seconds_left is not None else []
    left += [f"of the job {stage.time_left}"] if stage.time_left else []
    shared = [f"done in {os.path.relpath(stage.shared)}"] if stage.shared else []
    return [stage.job or "", step, loss, ", ".join(left), "; ".join([*shared, *([stage.note] if stage.note else [])])]
