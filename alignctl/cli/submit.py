"""Plans as SLURM jobs: submitted, or shown. Torch-free."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence

import click

from alignctl.launch.slurm import commands, defaults, plan_jobs, scripts, submit
from alignctl.plan.plan import RunPlan


def submit_plans(plans: Sequence[RunPlan], as_json: bool = False) -> None:
    """Submits what is not done of frozen plans, and says what became which job.

    Raises:
        LaunchError: SLURM refused a job.
    """
    jobs = plan_jobs(plans)
    submitted: dict[str, dict[str, str]] = {plan.run_dir: {} for plan in plans}
    for job, job_id in zip(jobs, submit(jobs), strict=True):
        for part, (plan, stage) in enumerate(job.parts):
            submitted[plan.run_dir][stage.config.name] = job.part_id(job_id, part)
    if as_json:
        click.echo(json.dumps([{"run_dir": run, "jobs": own} for run, own in submitted.items()], indent=2))
        return
    for run, own in submitted.items():
        listed = ", ".join(f"{stage} is job {job}" for stage, job in own.items())
        click.echo(f"submitted: {listed}\nsee `alignctl status {shlex.quote(os.path.relpath(run))}`", err=True)
    counts = dict.fromkeys(f"{name}={value}" for job in jobs for name, value in defaults(job, os.environ).items())
    if counts:
        click.echo(f"from your environment: {', '.join(counts)}", err=True)


def print_jobs(plans: Sequence[RunPlan]) -> None:
    """The jobs of plans as they would be submitted: the commands, and the scripts."""
    jobs = plan_jobs(plans)
    for job, command in zip(jobs, commands(jobs, os.environ), strict=True):
        click.echo(f"\n$ {command}")
        for path, text in scripts(job).items():
            click.echo(f"\n# {path}\n{text}")
