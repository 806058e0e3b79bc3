"""`alignctl train`: from a request to a finished run. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from alignctl.checks.notices import find_notices
from alignctl.checks.problems import find_problems
from alignctl.cli.display import Display
from alignctl.cli.submit import print_jobs, submit_plans
from alignctl.cli.summary import print_comparison, print_summary, run_summary
from alignctl.cli.tables import print_plan
from alignctl.cli.terminal import say_notice
from alignctl.config.compose import Request, compose, expand_sweep, read_request, swept
from alignctl.config.schema import RunSettings
from alignctl.config.secrets import mask, mask_override
from alignctl.errors import AlignctlError, Interrupted, Problem, RequestError, Stopped
from alignctl.launch.beforehand import SEEN_ON_SUBMIT, look_beforehand
from alignctl.launch.local import check_machine, refuse_four_bits_here, run_plan, wait_for_first
from alignctl.launch.queue import check_slurm_here
from alignctl.launch.slurm import refuse_if_queued
from alignctl.plan.freeze import (
    absolute_paths,
    find_run,
    fingerprints,
    freeze,
    link_stages,
    new_run_dir,
    refuse_left_behind,
    refuse_other_run,
    refuse_other_shares,
)
from alignctl.plan.plan import RunPlan, common_stages, make_plan
from alignctl.plan.room import refuse_without_room
from alignctl.run.owner import refuse_others
from alignctl.run.paths import RunPaths
from alignctl.run.state import is_done, locked

RUNS = Path("runs")
_NAME_LENGTH = 100


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and planned."""

    label: str
    """What sets it apart from the other points of a sweep; empty for a single run."""
    config: dict[str, Any]
    plan: RunPlan
    shared: Mapping[str, RunPaths] = field(default_factory=dict)
    """Stages that a point before does for this one, too, and its run."""


def train_command(
    overrides: Sequence[str],
    recipe_dirs: Sequence[Path],
    dry_run: bool,
    multirun: bool,
    new: bool,
    as_json: bool,
    trusted: bool = False,
    on_slurm: bool = False,
) -> None:
    """Checks everything, then runs it, or submits it where the launcher is SLURM's.

    Args:
        trusted: Whether run directories are to be taken that others may have written.
        on_slurm: Whether it has to be; the plain one is taken where none is named.
    """
    request = read_request(overrides, recipe_dirs)
    if on_slurm and compose(request)[0].get("launcher", {}).get("type") != "slurm":
        request = dataclasses.replace(request, overrides=(*request.overrides, "launcher=slurm"))
    if not any(override.startswith("recipe=") for override in overrides):
        click.echo(f"no recipe named: recipe={request.recipe.name}", err=True)
    points = expand_sweep(request) if multirun else [request]
    if not dry_run:
        with _unused_folders_removed() as made:
            _start(_prepare(request, points, new, made, trusted), multirun, as_json)
        return
    prepared = _prepare(request, points, new, None, trusted)
    for point in prepared:
        _refuse(point)  # before a plan says that it continues
    _print_plans(prepared, multirun, as_json)
    for notice in dict.fromkeys(line for point in prepared for line in _notices(point)):
        click.echo(f"\nnotice: {notice}", err=as_json)
    click.echo("\nDry run: nothing was written. Without `--dry-run` this starts.", err=as_json)


def _start(prepared: Sequence[Prepared], multirun: bool, as_json: bool) -> None:
    """Runs or submits the points of a request."""
    if any(_on_slurm(point.plan) for point in prepared):
        _submit(prepared, as_json)
        return
    finished, failed = [], []
    for point in prepared:
        try:
            _run(point)
            finished.append((point.label, run_summary(point.plan)))
        except (Stopped, Interrupted):
            raise
        except AlignctlError as error:
            if not multirun:
                raise
            failed.append(point.label)
            click.echo(f"{point.label}: {error}", err=True)
    _print_results(finished, multirun, as_json)
    if failed:
        raise AlignctlError(f"{len(failed)} of {len(prepared)} points failed: {'; '.join(failed)}")


@contextmanager
def _unused_folders_removed() -> Iterator[list[Path]]:
    """Leaves no folder behind that was made for a run which did not begin: of those that are put into this list."""
    made: list[Path] = []
    try:
        yield made
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or gone
                folder.rmdir()


def _prepare(
    request: Request, points: Sequence[Request], new: bool, made: list[Path] | None, trusted: bool
) -> list[Prepared]:
    """Composes, checks and plans every point; all problems of all points are reported together.

    Args:
        made: Takes the folders of new runs, which are made; None makes none.
        trusted: Whether folders are to be taken that others may have written.

    Raises:
        RequestError: Something is wrong with any of them; nothing was started.
        LaunchError: A folder is not to be taken.
    """
    composed: list[tuple[str, dict[str, Any]]] = []
    problems: list[Problem] = []
    for point in points:
        config, found = compose(point)
        problems += found + find_problems(config)
        composed.append((" ".join(map(mask_override, swept(request, point))), config))
        if new and config.get("run_dir"):
            problems.append(Problem("`--new` makes a folder, but `run_dir` names one", "give another `run_dir`"))
    if problems:
        raise RequestError.from_problems(list(dict.fromkeys(problems)))
    planned = [
        _plan(request.recipe.name, label if len(points) > 1 else "", absolute_paths(config), new, made, trusted)
        for label, config in composed
    ]
    for point in planned:
        refuse_others(point.plan.paths.root, trusted, say_notice)
    shared = common_stages([point.plan for point in planned])
    return [dataclasses.replace(point, shared=others) for point, others in zip(planned, shared, strict=True)]


def _plan(
    recipe: str, label: str, config: dict[str, Any], new: bool, made: list[Path] | None, trusted: bool
) -> Prepared:
    """Plans a run in the folder asked for, else in that of the same run before, else in a new one."""
    if given := config.get("run_dir"):
        run_dir = Path(given).expanduser().resolve() / _folder_name(label)
        return Prepared(label, config, make_plan(config, recipe, run_dir))
    suffix = f"_{_folder_name(label)}" if label else ""
    if not new:
        would_be = make_plan(config, recipe, new_run_dir(recipe, RUNS.resolve(), suffix))
        if earlier := find_run(recipe, RUNS.resolve(), fingerprints(would_be), trusted, say_notice):
            return Prepared(label, config, make_plan(config, recipe, earlier))
        refuse_left_behind(would_be, RUNS.resolve(), config)
    run_dir = new_run_dir(recipe, RUNS.resolve(), suffix, make=made is not None)
    if made is not None:
        made.append(run_dir)
    return Prepared(label, config, make_plan(config, recipe, run_dir))


def _folder_name(label: str) -> str:
    """A point of a sweep as the name of a folder; a hash keeps points apart that would be written alike."""
    name = re.sub(r"[^\w.=,+-]+", "_", label)[:_NAME_LENGTH]
    return name if name == label.replace(" ", "_") else f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _on_slurm(plan: RunPlan) -> bool:
    return any(stage.config.launcher.type == "slurm" for stage in plan.stages)


def _refuse(point: Prepared) -> None:
    """What keeps a plan from being run, as far as it takes no machine and no model to see it.

    Raises:
        RequestError, LaunchError: What is in its folder is another run, or begun by processes that shared it otherwise;
            another job has it; it wants a GPU for 4 bits; there is no room on the disk.
    """
    refuse_other_run(point.plan, point.config)
    refuse_other_shares(point.plan)
    refuse_if_queued(point.plan)
    refuse_four_bits_here(point.plan)
    refuse_without_room(point.plan)


def _is_finished(point: Prepared) -> bool:
    """Whether nothing is left to do, which is said then. What is there has to be this run."""
    plan = point.plan
    _refuse(point)
    if not plan.paths.plan.exists() or not all(is_done(plan.paths.stage(stage.config.name)) for stage in plan.stages):
        return False
    again = "" if point.config.get("run_dir") else " (`--new` runs it again)"
    click.echo(f"already finished: {plan.run_dir}{again}", err=True)
    return True


def _submit(prepared: Sequence[Prepared], as_json: bool) -> None:
    """Freezes plans and submits them together."""
    check_slurm_here()
    left = [point for point in prepared if not _is_finished(point)]
    with ExitStack() as locks:
        for point in left:
            locks.enter_context(locked(point.plan.paths))
            freeze(point.plan, point.config, sys.argv)
            link_stages(point.plan, point.shared)
            with Display(RunSettings.log_every) as display:
                for notice in _notices(point):
                    display.notice(notice)
                look_beforehand(point.plan, display, SEEN_ON_SUBMIT)
        if left:
            submit_plans([point.plan for point in left], as_json)


def _run(point: Prepared) -> None:
    """Freezes and runs one plan, or says that it is finished."""
    plan = point.plan
    if _is_finished(point):
        return
    check_machine(plan)
    helps = any(stage.config.launcher.node_rank > 0 for stage in plan.stages)  # the first machine keeps the books
    with (
        nullcontext() if helps else locked(plan.paths),
        Display(point.config.get("log_every", RunSettings.log_every)) as display,
    ):
        if helps:
            wait_for_first(plan)
        else:
            freeze(plan, point.config, sys.argv)
            link_stages(plan, point.shared)
        display.say(f"{point.label + ': ' if point.label else ''}{plan.recipe} in {plan.run_dir}")
        for stage in plan.stages:
            if is_done(plan.paths.stage(stage.config.name)):
                display.say(f"{stage.config.name}: done before")
        for notice in _notices(point):
            display.notice(notice)
        run_plan(plan, display)


def _notices(point: Prepared) -> list[str]:
    """What people should know of the stages that are left."""
    names = [stage.config.name for stage in point.plan.stages]
    return find_notices(point.config, [name for name in names if not is_done(point.plan.paths.stage(name))])


def _print_plans(prepared: Sequence[Prepared], multirun: bool, as_json: bool) -> None:
    if as_json:
        shown = [{"config": mask(point.config), "plan": mask(point.plan.to_dict())} for point in prepared]
        click.echo(json.dumps(shown if multirun else shown[0], indent=2))
        return
    for point in prepared:
        print_plan(point.plan)
    if any(_on_slurm(point.plan) for point in prepared):
        print_jobs([point.plan for point in prepared])


def _print_results(finished: list[tuple[str, dict[str, Any]]], multirun: bool, as_json: bool) -> None:
    """A run's summary, or a sweep's comparison: a list in JSON, however many points it has."""
    if as_json and multirun:
        click.echo(json.dumps([{"point": label} | summary for label, summary in finished], indent=2))
    elif as_json:
        click.echo(json.dumps(finished[0][1], indent=2))
    elif not multirun:
        print_summary(finished[0][1])
    elif finished:
        print_comparison(finished)
