"""What SLURM says of jobs, and what is said to it. Torch-free.

squeue knows jobs that wait or run and, for some minutes, those that ended; sacct knows all, where there are accounts.
Before a job counts as gone, scontrol is asked, too, which knows no filter.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alignctl.errors import LaunchError
from alignctl.launch.environment import slurm_environment

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_ENDING = ("COMPLETING", "SIGNALING", "STAGE_OUT")
_WORKING = (*_ENDING, "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
"""States of jobs of which nothing runs any more, nor will."""

UNKNOWN = "UNKNOWN"
"""State of all jobs where SLURM cannot be asked."""

_FORGOTTEN = "Invalid job id"  # what squeue, scontrol and scancel say of one that SLURM has forgotten
_ID = re.compile(r"(\d+)(?:;\S+)?", re.ASCII)  # "12;cluster"
_ENDS_S, _LOOK_EVERY_S = 15.0, 0.5  # how long SLURM may take to see to a cancelled job, and how often it is asked


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    """In its own words: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT and so on."""
    reason: str | None = None
    """Why it waits, or is not known."""
    time_left: str | None = None
    """Until its limit, D-HH:MM:SS, while it runs."""

    @property
    def waits(self) -> bool:
        return self.state in _WAITING

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.waits or self.state in _WORKING

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended, and does not end just now."""
        return self.active and self.state not in _ENDING


def job_states(ids: Sequence[str], ended: Collection[str] = ()) -> dict[str, JobState]:
    """States of jobs by id (`12`, or `12_0` in an array). A job that SLURM does not know any more is not there; where
    it does not answer, all are `UNKNOWN`.

    Args:
        ended: Those of which it is known how they ended, so that nobody but squeue is asked for them.
    """
    if not ids:
        return {}
    if shutil.which("squeue") is None:
        return dict.fromkeys(ids, JobState(UNKNOWN, "there is no SLURM here to ask"))
    asked = ",".join(dict.fromkeys(job.partition("_")[0] for job in ids))
    answer = _run("squeue", "--noheader", "--array", "--states=all", f"--jobs={asked}", "--format=%i|%T|%L|%r")
    if answer.returncode and _FORGOTTEN not in answer.stderr:
        return dict.fromkeys(ids, JobState(UNKNOWN, f"squeue does not answer: {_said(answer)}"))
    found = {}
    for line in answer.stdout.splitlines():
        job, state, left, reason = line.split("|", 3)
        known = JobState(state, time_left=left if state == "RUNNING" else None)
        found[job] = dataclasses.replace(known, reason=reason) if known.waits else known
    for others in (_remembered, _accounts):
        found |= others([job for job in ids if job not in found and job not in ended])
    return {job: found[job] for job in ids if job in found}


def _remembered(ids: Sequence[str]) -> dict[str, JobState]:
    """States of what scontrol knows, asked one by one, where a machine has it."""
    if shutil.which("scontrol") is None:
        return {}
    found = {}
    for job in ids:
        answer = _run("scontrol", "--oneliner", "show", "job", job)
        if state := re.search(r"\bJobState=(\w+)(?: Reason=(\S+))?", answer.stdout):
            known = JobState(state[1])
            found[job] = dataclasses.replace(known, reason=state[2]) if known.waits else known
        elif _FORGOTTEN not in answer.stderr:
            found[job] = JobState(UNKNOWN, f"scontrol does not answer: {_said(answer)}")
    return found


def _accounts(ids: Sequence[str]) -> dict[str, JobState]:
    """States from the accounts, where a site keeps them."""
    if not ids or shutil.which("sacct") is None:
        return {}
    jobs = f"--jobs={','.join(ids)}"
    answer = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", jobs)
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return {row[0]: JobState(row[1].split()[0]) for row in rows if row[0] in ids and row[1]}  # "CANCELLED by 1000"


def submit_job(options: Sequence[str], script: str, defaults: Mapping[str, str]) -> str:
    """Hands a script to SLURM. Returns the job's id.

    Args:
        defaults: Variables of sbatch's that count (`sbatch_defaults`).

    Raises:
        LaunchError: SLURM refused, in its own words, or did not say what the job is called.
    """
    answer = _run(*sbatch_command(options, script), variables=defaults)
    if answer.returncode:
        raise LaunchError(f"SLURM refused the job: {_said(answer)}", _hint(answer.stderr))
    ids = [found[1] for line in answer.stdout.splitlines() if (found := _ID.fullmatch(line.strip()))]
    if not ids:
        name = next((option.partition("=")[2] for option in options if option.startswith("--job-name=")), "")
        raise LaunchError(
            "`sbatch` did not say which number the job has, so nothing more is submitted; it said:\n"
            + (answer.stdout.strip() or "(nothing)"),
            f"if the job is there, cancel it by hand: `squeue --user=$USER --name={shlex.quote(name)}` shows its "
            "number, for `scancel NUMBER`",
        )
    return ids[-1]  # sites print banners and checks before it


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
    """Cancels jobs, all at once, so that none starts because another is gone, and looks whether they end; those that
    have ended do not matter.

    Raises:
        LaunchError: SLURM refused, or one of them goes on.
    """
    if not ids:
        return
    answer = _run("scancel", *ids)
    if answer.returncode and _FORGOTTEN not in answer.stderr:
        raise LaunchError(f"SLURM does not cancel: {_said(answer)}")
    until = time.monotonic() + _ENDS_S
    while left := {job: now for job, now in job_states(ids).items() if now.goes_on or now.state == UNKNOWN}:
        if time.monotonic() > until:
            listed = ", ".join(f"{job} ({now.reason if now.state == UNKNOWN else now.state.lower()})"
                               for job, now in left.items())  # fmt: skip
            raise LaunchError(
                f"`scancel` said nothing, and yet jobs have not ended: {listed}",
                f"see `scontrol show job {next(iter(left))}`, and give the same command again",
            )
        time.sleep(_LOOK_EVERY_S)


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


def _run(*command: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What a command of SLURM's answers.

    Args:
        variables: That it is to see of those that speak to it.
    """
    environment = slurm_environment(os.environ) | dict(variables or {})
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise LaunchError(f"there is no `{command[0]}` on this machine") from error


def _said(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command of SLURM's complained about, in one line."""
    lines = [line.partition("error: ")[2] or line for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit code {answer.returncode}"


def _hint(stderr: str) -> str | None:
    """What to do about a refusal that is common."""
    said = stderr.lower()
    if "account" in said:
        return (
            "set `launcher.account` to one of yours: `sacctmgr show associations user=$USER format=account,partition`"
        )
    if "partition" in said:
        names = _run("sinfo", "--noheader", "--format=%R").stdout.split()
        there = f"; there are {', '.join(dict.fromkeys(names))}" if names else ""
        return f"set `launcher.partition`{there}"
    if "time limit" in said:
        return "set `launcher.time` to no more than the partition's limit: `sinfo -o '%R %l'`"
    if "qos" in said:
        return "set `launcher.qos` to one of yours: `sacctmgr show associations user=$USER format=account,qos`"
    if "feature" in said:
        return "set `launcher.constraint` to features that machines have: `sinfo -o '%N %f'`"
    if "node name" in said:
        return "set `launcher.nodelist` to machines that there are: `sinfo -N`"
    if "node configuration" in said or "gres" in said:
        return (
            "see what the machines have with `sinfo -o '%R %D %G %c %m'`, and set `launcher.gpus_per_node`, "
            "`launcher.cpus_per_process` or `launcher.mem` accordingly"
        )
    return None
