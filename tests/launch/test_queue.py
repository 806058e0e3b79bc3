"""What is said to SLURM's commands and how their answers are read, with commands that answer as sites' do."""

from __future__ import annotations

import os
import shlex
import time

import pytest

from alignctl.errors import LaunchError
from alignctl.launch import queue

BANNER = "-----------------\n   Welcome to Example3, 12 nodes\n--> Checking allocation (main, 12)...OK\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Puts commands before those of the machine: each writes down what it is given, prints a text, and ends."""

    def command(name: str, text: str, code: int = 0, stderr: str = "") -> None:
        file = tmp_path / name
        file.write_text(
            f'#!/bin/bash\necho {name} "$@" >>{shlex.quote(str(tmp_path / "said"))}\n'
            f"printf %s {shlex.quote(text)}\nprintf %s {shlex.quote(stderr)} >&2\nexit {code}\n"
        )
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command.said = tmp_path / "said"
    return command


@pytest.mark.parametrize(
    "answer", ["12\n", "12;cluster\n", f"{BANNER}12\n", f"99\n{BANNER} 12;cluster \n\nThank you.\n"]
)
def test_the_id_is_the_last_line_that_is_a_number(site, answer):
    site("sbatch", answer)
    assert queue.submit_job(["--job-name=mine-sft"], "job.sh", {}) == "12"


@pytest.mark.parametrize("answer", [BANNER, "Submitted batch job 12\n", ""])
def test_without_a_number_it_is_said_what_to_cancel(site, answer):
    site("sbatch", answer)
    with pytest.raises(LaunchError, match="nothing more is submitted") as raised:
        queue.submit_job(["--job-name=mine-sft"], "job.sh", {})
    assert answer.strip() in str(raised.value)
    assert "hint: if the job is there, cancel it by hand: `squeue --user=$USER --name=mine-sft`" in str(raised.value)


def test_one_that_squeue_does_not_know_may_be_there(site):
    """What scontrol said of a job that was put back into the queue, and of one that nobody knows."""
    site("squeue", "12|RUNNING|9:58|None\n")
    site("scontrol", "JobId=13 JobName=x JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1\n")
    site("sacct", "", code=1)
    found = queue.job_states(["12", "13"])
    assert found == {"12": queue.JobState("RUNNING", time_left="9:58"), "13": queue.JobState("PENDING", "BeginTime")}
    assert queue.job_states(["12", "13"], ended=["13"]) == {"12": found["12"]}
    site("scontrol", "", code=1, stderr="slurm_load_jobs error: Invalid job id specified\n")
    assert queue.job_states(["12", "13"]) == {"12": found["12"]}
    site("scontrol", "", code=1, stderr="slurm_load_jobs error: Unable to contact slurm controller\n")
    assert queue.job_states(["13"])["13"].state == queue.UNKNOWN


def test_a_machine_that_has_squeue_alone_is_enough(site, monkeypatch):
    site("squeue", "12|RUNNING|9:58|None\n")
    monkeypatch.setattr(queue.shutil, "which", lambda name: name == "squeue" or None)
    assert list(queue.job_states(["12", "13"])) == ["12"]


def test_a_job_that_goes_on_is_not_called_cancelled(site, monkeypatch):
    monkeypatch.setattr(queue, "_ENDS_S", 0.0)
    site("scancel", "")
    site("squeue", "12|RUNNING|9:58|None\n13|COMPLETING|0:00|None\n")
    with pytest.raises(LaunchError, match=r"have not ended: 12 \(running\)"):
        queue.cancel_jobs(["12", "13"])
    site("squeue", "12|COMPLETING|0:00|None\n13|CANCELLED|0:00|None\n")
    began = time.monotonic()
    queue.cancel_jobs(["12", "13"])
    assert time.monotonic() < began + queue._LOOK_EVERY_S, "it does not wait for those that save and end"
    assert site.said.read_text().startswith("scancel 12 13\nsqueue ")
