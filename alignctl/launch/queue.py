"""What SLURM says of jobs, and what is said to it. Torch-free.

squeue knows jobs that wait or run and, for some minutes, those that ended; sacct knows all, where there are accounts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignctl.errors import LaunchError

ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "SIGNALING",
          "STOPPED", "RESV_DEL_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "STAGE_OUT")  # fmt: skip
"""States of jobs that have not ended."""

UNKNOWN = "UNKNOWN"
"""State of all jobs where there is no SLURM to ask."""

_FORGOTTEN = "Invalid job id"  # what squeue and scancel say of one that SLURM has forgotten


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    """In its own words: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT and so on."""
    reason: str | None = None
    """Why it waits."""
    time_left: str | None = None
    """Until its limit, D-HH:MM:SS, while it runs."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def job_states(ids: Sequence[str]) -> dict[str, JobState]:
    """States of jobs by id (`12`, or `12_0` in an array); a job that SLURM does not know any more is not there.

    Raises:
        LaunchError: SLURM does not answer.
    """
    if ids and shutil.which("squeue") is None:
        return dict.fromkeys(ids, JobState(UNKNOWN))
    if not ids:
        return {}
    asked = ",".join(dict.fromkeys(job.partition("_")[0] for job in ids))
    answer = _run("squeue", "--noheader", "--array", "--states=all", f"--jobs={asked}", "--format=%i|%T|%L|%r")
    if answer.returncode and _FORGOTTEN not in answer.stderr:
        raise LaunchError(f"squeue does not answer: {_said(answer)}")
    found = {}
    for line in answer.stdout.splitlines():
        job, state, left, reason = line.split("|", 3)
        waits = state == "PENDING"
        found[job] = JobState(state, reason if waits else None, left if state == "RUNNING" else None)
    missing = [job for job in ids if job not in found]
    return {job: found[job] for job in ids if job in found} | (_accounts(missing) if missing else {})


def _accounts(ids: Sequence[str]) -> dict[str, JobState]:
    """States from the accounts, where a site keeps them."""
    if shutil.which("sacct") is None:
        return {}
    jobs = f"--jobs={','.join(ids)}"
    answer = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", jobs)
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return {row[0]: JobState(row[1].split()[0]) for row in rows if row[0] in ids and row[1]}  # "CANCELLED by 1000"


def submit_job(options: Sequence[str], script: str) -> str:
    """Hands a script to SLURM. Returns the job's id.

    Raises:
        LaunchError: SLURM refused, in its own words.
    """
    answer = _run(*sbatch_command(options, script))
    if answer.returncode:
        raise LaunchError(f"SLURM refused the job: {_said(answer)}", _hint(answer.stderr))
    return answer.stdout.strip().partition(";")[0]  # "12;cluster"


def sbatch_command(options: Sequence[str], script: str) -> list[str]:
    return ["sbatch", "--parsable", *options, script]


def release(ids: Sequence[str]) -> None:
    """Lets jobs start that were submitted on hold.

    Raises:
        LaunchError: SLURM refused.
    """
    for job in ids:
        answer = _run("scontrol", "release", job)
        if answer.returncode:
            raise LaunchError(f"SLURM does not let the job {job} start: {_said(answer)}")


def cancel_jobs(ids: Sequence[str]) -> None:
    """Cancels jobs, all at once, so that none starts because another is gone; those that have ended do not matter.

    Raises:
        LaunchError: SLURM refused.
    """
    if ids:
        answer = _run("scancel", *ids)
        if answer.returncode and _FORGOTTEN not in answer.stderr:
            raise LaunchError(f"SLURM does not cancel: {_said(answer)}")


def check_slurm_here() -> None:
    """Refuses a machine from which nothing can be submitted.

    Raises:
        LaunchError: There is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "there is no `sbatch` on this machine",
            "run it on a login node of the cluster, see the scripts with `--dry-run`, or set `launcher=local`",
        )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=clean(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise LaunchError(f"there is no `{command[0]}` on this machine") from error


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what SLURM set for the job that we may be in: sbatch would take it for wishes."""
    kept = ("SLURM_CONF",)
    return {key: value for key, value in environment.items() if not key.startswith("SLURM_") or key in kept}


def _said(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command of SLURM's complained about, in one line."""
    lines = [line.partition("error: ")[2] or line for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit code {answer.returncode}"


def _hint(stderr: str) -> str | None:
    """What to do about a refusal that is common."""
    if "partition" in stderr.lower():
        names = _run("sinfo", "--noheader", "--format=%R").stdout.split()
        return f"set `launcher.partition`; there are {', '.join(dict.fromkeys(names))}" if names else None
    if "account" in stderr.lower():
        return "set `launcher.account` to one of yours: `sacctmgr show associations user=$USER format=account`"
    if "node configuration" in stderr or "gres" in stderr.lower():
        return "see what the machines have with `sinfo -o '%R %D %G %c %m'`, and set `launcher.gpus_per_node`, " + (
            "`launcher.cpus_per_process` or `launcher.mem` accordingly"
        )
    return None
