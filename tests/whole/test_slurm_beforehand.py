"""Rows of all stages are looked at before one trains, on a real SLURM: by whoever submits, or by the first job."""

from __future__ import annotations

import pytest
from support.files import write_rows
from support.models import TINY
from support.slurm_cluster import ONE, job, logged_in, started, states, wait_for_state

from alignctl.launch.beforehand import SEEN_ON_SUBMIT

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night]

PIPELINE = (
    "recipe=sft_rm_quickstart", "sft.data.limit=96", "data.eval_limit=8", "eval.prompts=0", "rehearse=true",
    "sft.max_steps=200", "rm.data.path=rows.jsonl", "rm.eval.judge=null", *TINY, *ONE,
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    yield from started(tmp_path_factory)


@pytest.fixture
def alignctl(cluster, tmp_path):
    yield from logged_in(cluster, tmp_path)


def rows(count: int) -> list[dict]:
    """Pairs of which one in twenty, but not of the first that a check looks at, is no better and no worse."""
    answers = ("b" if i % 20 or i < 40 else "a" for i in range(count))
    return [{"prompt": f"{i}?", "chosen": "a", "rejected": rejected} for i, rejected in enumerate(answers)]


def test_few_rows_are_refused_by_the_command_that_submits(alignctl, cluster, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows(200))
    said = alignctl("submit", *PIPELINE, "run_dir=run", code=2)
    assert "error: stage `rm`: " in said
    assert "`data.max_skipped=0.01` is the most allowed" in said
    assert "Traceback" not in said
    assert cluster.queue() == {}


def test_many_rows_are_refused_by_the_first_job(alignctl, cluster, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows(SEEN_ON_SUBMIT + 100))
    said = alignctl("submit", *PIPELINE, "run_dir=run")
    assert "has more than 100,000 rows: the first job looks at them" in said
    wait_for_state(alignctl, "run", "failed")
    logs = alignctl("logs", "run")
    assert "stage `rm`: " in logs
    assert "`data.max_skipped=0.01` is the most allowed" in logs
    assert "Traceback" not in logs
    assert states(alignctl, "run") == {"sft": "failed", "rm": "failed", "run": "failed"}
    assert cluster.facts(job(tmp_path / "run", "sft"))["ExitCode"] == "2:0"
    assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()
