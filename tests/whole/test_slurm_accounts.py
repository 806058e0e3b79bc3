"""Jobs of a real SLURM that keeps accounts: what is said of those that squeue has forgotten."""

from __future__ import annotations

import os
import re
import signal

import pytest
from support.files import outcome
from support.processes import beat, wait_for_step, wait_until
from support.slurm_cluster import (
    ONE,
    TINY,
    Cluster,
    job,
    logged_in,
    started,
    states,
    wait_for_end,
    wait_for_state,
)

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    yield from started(tmp_path_factory, "--accounts")


@pytest.fixture
def alignctl(cluster, tmp_path):
    yield from logged_in(cluster, tmp_path)


def forgotten(cluster: Cluster, *jobs: str) -> bool:
    return not set(jobs) & set(cluster.queue())


def test_out_of_time_before_it_could_save(alignctl, cluster, tmp_path):
    """Its process does not answer, so SLURM kills the job at its limit. Minutes later only the accounts know."""
    run = tmp_path / "run"
    command = ("submit", *TINY, *ONE, "launcher.account=lab", "run_dir=run")
    alignctl(*command, "launcher.time=00:20:00", "launcher.signal_seconds=10")
    first, second = job(run, "sft"), job(run, "dpo")
    wait_for_step(run / "sft", 25)
    os.kill(beat(run / "sft")["pid"], signal.SIGSTOP)
    cluster.run("scontrol", "update", f"JobId={first}", "TimeLimit=1")
    wait_for_end(alignctl, "run", "failed")
    wait_until(lambda: forgotten(cluster, first, second), "squeue still knows")
    assert "TIMEOUT" in cluster.run("sacct", "--noheader", "--allocations", "--format=State", f"--jobs={first}")
    assert states(alignctl, "run") == {"sft": "failed", "dpo": "cancelled", "run": "failed"}
    saved = r"out of time before it could save: raise `launcher.signal_seconds`; step \d+ is saved"
    assert re.search(rf"sft +failed +{first} .*{saved}", alignctl("status", "run"))
    alignctl(*command, "launcher.time=00:30:00")
    wait_for_state(alignctl, "run", "done")
    wait_until(lambda: forgotten(cluster, job(run, "sft"), job(run, "dpo")), "squeue still knows")
    assert states(alignctl, "run") == {"sft": "done", "dpo": "done", "run": "done"}
    assert [row[0] for row in outcome(run / "sft")[1]] == list(range(1, 161))


def test_an_account_that_does_not_exist(alignctl, cluster):
    said = alignctl("submit", *TINY, *ONE, "launcher.account=nope", "run_dir=run", code=3)
    assert said.startswith("error: SLURM refused the job: ")
    assert "hint: set `launcher.account` to one of yours: `sacctmgr show associations" in said
    assert len(said.splitlines()) == 2
