"""Runs the stages of plans as SLURM jobs: one job a stage, each after the one before it. Torch-free.

Points of a sweep share the stages in which they do not differ; stages of several points that wait for the same job are
one array.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.config.secrets import named_variables
from alignctl.errors import AlignctlError, LaunchError
from alignctl.launch.environment import handing_on, sbatch_defaults, shown_defaults
from alignctl.launch.queue import UNKNOWN, cancel_jobs, job_states, release, sbatch_command, submit_job
from alignctl.launch.slurm_script import job_name, render_array_script, render_script, sbatch_options
from alignctl.plan.freeze import refuse_anothers_stage
from alignctl.plan.plan import RunPlan, StagePlan, common_stages
from alignctl.run.files import write_text
from alignctl.run.paths import RunPaths
from alignctl.run.state import is_done, read_status, write_stage_state


@dataclass(frozen=True)
class Job:
    """A job that is to be submitted."""

    parts: tuple[tuple[RunPlan, StagePlan], ...]
    """The stages it runs; several are an array, one for each point of a sweep."""
    after: tuple[tuple[int, int], ...]
    """The jobs that have to succeed before it: which of those in the list, and which part of each."""
    options: tuple[str, ...]
    """Of sbatch."""
    variables: tuple[str, ...] = ()
    """That its stages take for something secret: it has to have them."""

    @property
    def script(self) -> Path:
        plan, stage = self.parts[0]
        folder = plan.paths.stage(stage.config.name)
        return folder.script if len(self.parts) == 1 else folder.array_script

    def part_id(self, job_id: str, part: int) -> str:
        """SLURM's name of one of its parts."""
        return job_id if len(self.parts) == 1 else f"{job_id}_{part}"


def plan_jobs(plans: Sequence[RunPlan]) -> list[Job]:
    """The jobs of all stages that are not done. A job comes after those it waits for.

    Raises:
        LaunchError: A stage is another run's to do, which is not among these.
    """
    jobs: list[Job] = []
    place: dict[tuple[str, str], tuple[int, int]] = {}  # of each stage of each run: its job, and which part of it
    shared = [_by_others(plan, others) for plan, others in zip(plans, common_stages(plans), strict=True)]
    for position in range(max(len(plan.stages) for plan in plans)):
        here = [(plan, plan.stages[position], others) for plan, others in zip(plans, shared, strict=True)
                if position < len(plan.stages)]  # fmt: skip
        groups: dict[Any, list[tuple[RunPlan, StagePlan]]] = {}
        for plan, stage, others in here:
            name = stage.config.name
            if name not in others and not is_done(plan.paths.stage(name)):
                refuse_anothers_stage(plan, name)
                before = ((plan.run_dir, earlier.config.name) for earlier in plan.stages[:position])
                after = tuple(sorted({place[one] for one in before if one in place}))
                group = after, repr(stage.config.launcher), job_name(plan.recipe, stage)
                groups.setdefault(group, []).append((plan, stage))
        for (after, _, job), parts in groups.items():
            place |= {(plan.run_dir, stage.config.name): (len(jobs), part) for part, (plan, stage) in enumerate(parts)}
            names = sorted(set().union(*(named_variables(stage.config.to_dict()) for _, stage in parts)))
            jobs.append(Job(tuple(parts), after, tuple(_options(job, parts, names)), tuple(names)))
        for plan, stage, others in here:
            name = stage.config.name
            if name in others and (owned := place.get((str(others[name].root), name))):
                place[plan.run_dir, name] = owned
    return jobs


def _by_others(plan: RunPlan, shared: Mapping[str, RunPaths]) -> dict[str, RunPaths]:
    """Of the stages that another run has, too, those that it does for this one, or will: the others have been begun
    here."""
    folders = {name: plan.paths.stage(name).root for name in shared}
    return {
        name: owner
        for name, owner in shared.items()
        if not folders[name].exists() or folders[name].resolve() == owner.stage(name).root.resolve()
    }


def _options(name: str, parts: Sequence[tuple[RunPlan, StagePlan]], variables: Sequence[str]) -> list[str]:
    plan, stage = parts[0]
    several = len(parts) > 1
    log = plan.paths.stage(stage.config.name).job_log("%A_%a" if several else "%j")
    array = [f"--array=0-{len(parts) - 1}"] if several else []
    return [*handing_on(sbatch_options(stage.config.launcher, name, log), variables, os.environ), *array]


def scripts(job: Job) -> dict[Path, str]:
    """The scripts of a job, the one that is submitted first."""
    own = {
        (paths := plan.paths.stage(stage.config.name)).script: render_script(stage, plan.run_dir, paths)
        for plan, stage in job.parts
    }
    if len(job.parts) == 1:
        return own
    return {job.script: render_array_script(job.parts[0][1].config.name, list(own))} | own


def defaults(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of sbatch's that count for a job, as they are shown."""
    return shown_defaults(sbatch_defaults(environ, job.options, job.variables))


def commands(jobs: Sequence[Job], environ: Mapping[str, str], ids: Sequence[str] = ()) -> list[str]:
    """What submits the jobs, as one would type it; a job that has no id yet is called after its stage."""
    names = [*ids, *(f"JOB_OF_{job.parts[0][1].config.name.upper()}" for job in jobs[len(ids) :])]
    typed = []
    for job in jobs:
        variables = [f"{name}={shlex.quote(value)}" for name, value in defaults(job, environ).items()]
        words = sbatch_command([*_dependency(job, jobs, names), *job.options], str(job.script))
        typed.append(" ".join([*variables, shlex.join(words)]))
    return typed


def _dependency(job: Job, jobs: Sequence[Job], ids: Sequence[str]) -> list[str]:
    if not job.after:
        return []
    names = [jobs[index].part_id(ids[index], part) for index, part in job.after]
    # Without the second option a job whose predecessor failed waits for ever.
    return [f"--dependency=afterok:{':'.join(names)}", "--kill-on-invalid-dep=yes"]


def submit(jobs: Sequence[Job]) -> list[str]:
    """Submits jobs and notes their ids in the status of their runs. Those that wait for no other are held until all are
    submitted. Returns the ids.

    Raises:
        LaunchError: SLURM refused one of them; then none stays in the queue.
    """
    ids: list[str] = []
    try:
        for job in jobs:
            for plan, stage in job.parts:
                plan.paths.stage(stage.config.name).job_log("").parent.mkdir(parents=True, exist_ok=True)
            for path, text in scripts(job).items():
                write_text(path, text)
            options = [*_dependency(job, jobs, ids), *job.options]
            variables = sbatch_defaults(os.environ, job.options, job.variables)
            ids.append(submit_job(options if job.after else ["--hold", *options], str(job.script), variables))
            _note(job, ids[-1], commands(jobs, os.environ, ids)[len(ids) - 1], defaults(job, os.environ))
        release([job_id for job, job_id in zip(jobs, ids, strict=True) if not job.after])
    except BaseException:  # whatever it is: a full disk, a closed terminal
        with suppress(AlignctlError):
            cancel_jobs(ids)
        for job in jobs[: len(ids)]:
            for plan, stage in job.parts:
                write_stage_state(plan.paths, stage.config.name, "cancelled")
        raise
    return ids


def _note(job: Job, job_id: str, command: str, variables: Mapping[str, str]) -> None:
    first_plan, first_stage = job.parts[0]
    for part, (plan, stage) in enumerate(job.parts):
        own = job.part_id(job_id, part)
        log = first_plan.paths.stage(first_stage.config.name).job_log(own)
        facts = {"id": own, "command": command, "log": str(log), "defaults": dict(variables)}
        write_stage_state(plan.paths, stage.config.name, "queued", job=facts, error=None)


def refuse_if_queued(plan: RunPlan) -> None:
    """Keeps a run that has jobs from being started otherwise, or submitted twice.

    Raises:
        LaunchError: Jobs of it wait or run, or SLURM does not say.
    """
    noted = read_status(plan.paths)["stages"]
    ids = [
        str(noted[name]["job"]["id"])
        for name in noted
        if noted[name].get("job") and not is_done(plan.paths.stage(name))
    ]
    active = {job: found for job, found in job_states(ids).items() if found.active or found.state == UNKNOWN}
    if active:
        listed = ", ".join(f"{job} ({found.state.lower()})" for job, found in active.items())
        where = shlex.quote(plan.run_dir)
        raise LaunchError(
            f"{plan.run_dir} has jobs in SLURM's queue: {listed}",
            f"see `alignctl status {where}`; `alignctl cancel {where}` ends them, and then it can be resumed",
        )
