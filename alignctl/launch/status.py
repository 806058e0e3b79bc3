"""What runs are doing, from what they leave in their folders and what SLURM says. Torch-free."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.config.forms import misfit
from alignctl.launch.queue import UNKNOWN, JobState, job_states
from alignctl.plan.freeze import read_plan
from alignctl.plan.plan import RunPlan, StagePlan
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json
from alignctl.run.forms import PROGRESS
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.state import is_done, is_held, read_status

_GONE = re.compile(r"^slurmstepd.*\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO (.+?))? \*\*\*", re.MULTILINE)
_LOG_END = 2**16  # bytes
_OVER = ("done", "failed", "cancelled")  # as noted: what SLURM has forgotten of such a job does not matter
# What SLURM calls the end of a job, and what it means for the stage; others speak for themselves.
_ENDED = {
    "CANCELLED": ("cancelled", ""),
    "TIMEOUT": ("failed", "out of time before it could save: raise `launcher.signal_seconds`"),
    "TIME LIMIT": ("failed", "out of time before it could save: raise `launcher.signal_seconds`"),
    "NODE_FAIL": ("failed", "a machine of its job failed"),
    "OUT_OF_MEMORY": ("failed", "SLURM ended its job for lack of memory: raise `launcher.mem`"),
    "PREEMPTED": ("stopped", "preempted"),
}


@dataclass(frozen=True)
class StageStatus:
    """What one stage is doing."""

    name: str
    method: str
    state: str
    job: str | None
    """Of SLURM."""
    shared: str | None
    """The run that does the stage for this one, too."""
    attempts: int
    step: int | None
    max_steps: int | None
    metrics: dict[str, float]
    """Loss and the method's most telling metrics, last logged."""
    seconds_left: float | None
    """Until training is done."""
    time_left: str | None
    """Until the limit of its job, D-HH:MM:SS."""
    note: str
    """What it is doing besides training, or why it waits."""
    error: str | None


@dataclass(frozen=True)
class RunStatus:
    """What a run is doing."""

    recipe: str
    run_dir: str
    stages: tuple[StageStatus, ...]

    @property
    def current(self) -> StageStatus:
        """The first stage that is not done, else the last."""
        return next((stage for stage in self.stages if stage.state != "done"), self.stages[-1])

    @property
    def state(self) -> str:
        return self.current.state

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "run_dir": self.run_dir, "state": self.state} | {
            "stages": {stage.name: dataclasses.asdict(stage) for stage in self.stages}
        }


def statuses(plans: Sequence[RunPlan]) -> list[RunStatus]:
    """What runs are doing; SLURM is asked once for all of them."""
    noted = {plan.run_dir: {stage.config.name: _noted(plan, stage) for stage in plan.stages} for plan in plans}
    states = {facts["job"]["id"]: facts["state"] for stages in noted.values() for facts in stages.values()
              if facts.get("job")}  # fmt: skip
    jobs = job_states(list(states), [job for job, state in states.items() if state in _OVER])
    return [
        RunStatus(
            plan.recipe,
            plan.run_dir,
            tuple(_stage(plan, stage, noted[plan.run_dir][stage.config.name], jobs) for stage in plan.stages),
        )
        for plan in plans
    ]


def read_run(paths: RunPaths) -> RunPlan:
    """The plan of a run whose files can be read, as `statuses` reads them.

    Raises:
        RequestError: One is damaged, or of another alignctl.
    """
    plan = read_plan(paths)
    for stage in plan.stages:
        _noted(plan, stage)
        is_done(_owner(plan, stage).stage(stage.config.name))
    return plan


def _owner(plan: RunPlan, stage: StagePlan) -> RunPaths:
    """The run that does a stage: this one, or the one its folder is a link to."""
    return RunPaths(plan.paths.stage(stage.config.name).root.resolve().parent)


def _noted(plan: RunPlan, stage: StagePlan) -> dict[str, Any]:
    return read_status(_owner(plan, stage))["stages"].get(stage.config.name, {})


def _stage(plan: RunPlan, stage: StagePlan, noted: Mapping[str, Any], jobs: Mapping[str, JobState]) -> StageStatus:
    name, owner = stage.config.name, _owner(plan, stage)
    paths = owner.stage(name)
    job = noted.get("job")
    found = jobs.get(job["id"]) if job else None
    state, why = _state(noted, paths, found, held=is_held(owner))
    progress = read_json(paths.progress)
    progress = {} if misfit(progress, PROGRESS) else progress  # only for whoever looks
    training = progress if "step" in progress else progress.get("trained") or {}
    running = state == "running"
    doing = progress.get("phase", "starting") if running and "step" not in progress else ""
    return StageStatus(
        name=name,
        method=stage.config.method,
        state=state,
        job=job["id"] if job else None,
        shared=str(owner.root) if owner.root != plan.paths.root.resolve() else None,
        attempts=noted.get("attempts", 0),
        step=training.get("step"),
        max_steps=training.get("max_steps"),
        metrics=training.get("metrics") or {},
        seconds_left=training.get("seconds_left") if running and not doing else None,
        time_left=found.time_left if found else None,
        note="; ".join(filter(None, [why, doing, _defaults(job) if state != "done" else ""])),
        error=noted.get("error") if state == "failed" else None,
    )


def _defaults(job: Mapping[str, Any] | None) -> str:
    """What a job has from the environment it was submitted in."""
    variables = (job or {}).get("defaults") or {}
    return f"with {', '.join(f'{name}={value}' for name, value in variables.items())}" if variables else ""


def _state(noted: Mapping[str, Any], paths: StagePaths, job: JobState | None, held: bool) -> tuple[str, str]:
    """The state of a stage, and what there is to say about it."""
    state = noted.get("state", "waiting")
    if is_done(paths):
        return "done", ""
    if state == "done":
        return "waiting", "what it made, or the rows it was trained on, are no longer there: it begins anew"
    if not noted.get("job"):
        gone = state == "running" and not held
        return ("interrupted", f"its process is gone; {_saved(paths)}") if gone else (state, _saved_if(state, paths))
    if job and job.state == UNKNOWN:
        return state, f"as last noted: {job.reason}"
    if job and job.waits:
        return "queued", f"{_saved(paths)}; waits: {job.reason}" if noted.get("attempts") else f"waits: {job.reason}"
    if job and job.active:
        return "running", ""
    ended = job.state if job else _said_in(Path(noted["job"]["log"]))
    if ended in _ENDED and state not in ("failed", "cancelled"):
        meaning, why = _ENDED[ended]
        return meaning, "; ".join(filter(None, [why, _saved(paths)]))
    if state == "queued":
        ran = job.state != "COMPLETED" if job else Path(noted["job"]["log"]).exists()
        return (
            ("failed", "its job ended before it began: see `alignctl logs`") if ran else ("cancelled", "it never began")
        )
    if state == "running":
        return "failed", f"its job ended without a word; {_saved(paths)}"
    return state, _saved_if(state, paths)


def _said_in(log: Path) -> str | None:
    """How a job ended by what SLURM wrote into its log, where SLURM itself has forgotten it."""
    if not log.is_file():
        return None
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_END))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    found = _GONE.findall(text)
    return (found[-1] or "CANCELLED") if found else None


def _saved_if(state: str, paths: StagePaths) -> str:
    return _saved(paths) if state in ("failed", "stopped", "interrupted", "cancelled") else ""


def _saved(paths: StagePaths) -> str:
    checkpoint = newest_checkpoint(paths.checkpoints)
    return f"step {checkpoint.step} is saved" if checkpoint else "nothing is saved"
