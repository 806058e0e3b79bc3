"""Runs stages in this process, from a request to a result: what the command does, without starting workers."""

from __future__ import annotations

from pathlib import Path

from alignctl.checks.problems import checked
from alignctl.config.compose import read_request
from alignctl.methods.registry import methods, resolve
from alignctl.monitor.stopping import StopSignal
from alignctl.plan.freeze import absolute_paths, freeze
from alignctl.plan.plan import RunPlan, make_plan
from alignctl.run.frozen import read_stage
from alignctl.run.products import take_rows


class NeverStops(StopSignal):
    """A signal that is never given; the test process keeps its own handlers."""

    requested = False

    def __init__(self) -> None:
        self.waits = False


class StopsAfter(NeverStops):
    """A signal given during an optimizer step."""

    def __init__(self, step: int) -> None:
        self.waits = False
        self._looks, self._step = 0, step

    @property
    def requested(self) -> bool:
        self._looks += 1
        return self._looks >= self._step


def frozen(run_dir: Path, *arguments: str) -> RunPlan:
    """Composes, checks, plans and freezes a recipe.

    Raises:
        AlignctlError: As the command would say it.
    """
    request = read_request(arguments)
    config = checked(request)
    plan = make_plan(absolute_paths(config), request.recipe.name, run_dir.resolve())
    freeze(plan, config, ["alignctl", "train"])
    return plan


def run_stages(run_dir: Path, *arguments: str, signal: StopSignal | None = None) -> Path:
    """Runs a recipe; returns the run directory.

    Raises:
        AlignctlError: As the command would say it.
    """
    plan = frozen(run_dir, *arguments)
    for name in (planned.config.name for planned in plan.stages):
        stage, weights = read_stage(plan.paths, name)
        take_rows(stage, plan.paths.stage(name))
        resolve(methods()[stage.method].stage_function)(stage, weights, plan.paths.stage(name), signal or NeverStops())
    return run_dir
