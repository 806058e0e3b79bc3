"""What is said of stages whose jobs SLURM has ended, or forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignctl.launch.queue import UNKNOWN, JobState
from alignctl.launch.status import _state
from alignctl.run.paths import StagePaths

LOG = "slurmstepd-n1: error: *** JOB {job} ON n1 CANCELLED AT 2026-11-25T18:30:21{why} ***\n"


@pytest.mark.parametrize(
    ("noted", "job", "log", "expected"),
    [
        ("queued", JobState("PENDING", reason="Resources"), "", ("queued", "waits: Resources")),
        ("queued", JobState("RUNNING"), "", ("running", "")),
        ("running", JobState("COMPLETING"), "", ("running", "")),
        ("queued", JobState("CANCELLED"), "", ("cancelled", "nothing is saved")),
        ("running", JobState("NODE_FAIL"), "", ("failed", "a machine of its job failed; nothing is saved")),
        ("running", JobState("OUT_OF_MEMORY"), "", ("failed", "raise `launcher.mem`; nothing is saved")),
        ("running", JobState("TIMEOUT"), "", ("failed", "raise `launcher.signal_seconds`; nothing is saved")),
        ("failed", JobState("FAILED"), "", ("failed", "nothing is saved")),
        ("stopped", None, LOG.format(job=12, why=""), ("cancelled", "nothing is saved")),
        ("stopped", None, "other", ("stopped", "nothing is saved")),
        ("running", None, LOG.format(job=12, why=" DUE TO TIME LIMIT"), ("failed", "raise `launcher.signal_seconds`")),
        ("stopped", None, LOG.format(job=12, why=" DUE TO JOB REQUEUE"), ("stopped", "nothing is saved")),
        ("queued", JobState("FAILED"), "module: not found", ("failed", "see `alignctl logs`")),
        ("queued", JobState("REQUEUE_HOLD", reason="launch failed"), "", ("queued", "waits: launch failed")),
        ("queued", None, None, ("cancelled", "it never began")),
        ("queued", None, "module: not found", ("failed", "see `alignctl logs`")),
        ("running", JobState(UNKNOWN, "there is no SLURM here to ask"), "", ("running", "no SLURM here to ask")),
        ("running", None, "", ("failed", "its job ended without a word; nothing is saved")),
    ],
)
def test_state(tmp_path: Path, noted, job, log, expected):
    if log is not None:
        (tmp_path / "job.log").write_text(log)
    facts = {"state": noted, "job": {"id": "12", "log": str(tmp_path / "job.log")}}
    state, why = _state(facts, StagePaths(tmp_path / "sft"), job, held=False)
    assert state == expected[0]
    assert expected[1] in why
