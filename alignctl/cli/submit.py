"""Plans as SLURM jobs: submitted, or shown. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click

from alignctl.launch.queue import check_slurm_here
from alignctl.launch.slurm import commands, job_ids, plan_jobs, refuse_if_queued, scripts, submit
from alignctl.plan.plan import RunPlan


def submit_plans(plans: Sequence[RunPlan], as_json: bool = False) -> None:
    """Submits what is not done of frozen plans, and says what became which job.

    Raises:
        LaunchError: This machine has no SLURM, a run is in its queue already, or it refused a job.
    """
    check_slurm_here()
    for plan in plans:
        refuse_if_queued(plan.paths)
    submit(plan_jobs(plans))
    submitted = [{"run_dir": plan.run_dir, "jobs": job_ids(plan.paths)} for plan in plans]
    if as_json:
        click.echo(json.dumps(submitted, indent=2))
        return
    for run in submitted:
        folder = os.path.relpath(run["run_dir"])
        jobs = ", ".join(f"{stage} is job {job}" for stage, job in run["jobs"].items())
        click.echo(f"submitted: {jobs}\nsee `alignctl status {folder}`", err=True)


def print_jobs(plans: Sequence[RunPlan]) -> None:
    """The jobs of plans as they would be submitted: the commands, and the scripts."""
    jobs = plan_jobs(plans)
    for job, command in zip(jobs, commands(jobs), strict=True):
        click.echo(f"\n$ {command}")
        for path, text in scripts(job).items():
            click.echo(f"\n# {path}\n{text}")
