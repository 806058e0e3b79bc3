"""Processes that compute rows together train as one process does, and each keeps its part of what that keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cells import STEPS, job
from support.daily import of_today
from support.many import differ, outcome, run_many

from alignctl.methods.registry import methods

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

KEPT = Path(__file__).parents[1] / "support" / "kept.py"
METHODS = [name for name, method in methods().items() if method.divides_rows]
TOGETHER = "distributed.parallelism_config.sp_size=2"
KINDS = ("ddp", "zero2", "zero3", "fsdp2")
WATCHED = [(name, "none", "ddp") for name in METHODS]  # what of a row each process keeps
CELLS = of_today([(name, peft, how) for name in METHODS for peft in ("none", "lora") for how in KINDS], 5)
CELLS = list(dict.fromkeys([*of_today(WATCHED, 3), *CELLS]))


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory, shared_data):
    """The run directories of all cells, together, and alone as `(method, adapter)`."""
    folder = tmp_path_factory.mktemp("together")
    alone = {cell[:2]: job(folder, shared_data, (*cell[:2], "auto"), (8, 1, "none")) for cell in CELLS}
    both = {cell: job(folder, shared_data, (*cell[:2], "auto"), (4, 1, cell[2])) for cell in CELLS}
    for one in both.values():
        one["arguments"].append(TOGETHER)
    run_many(folder, list(alone.values()), 1, KEPT)
    run_many(folder, list(both.values()), 2, KEPT)
    return {key: one["run_dir"] for key, one in (alone | both).items()}


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_losses_and_weights_are_those_of_one_process(run_dirs, cell):
    losses, weights = outcome(run_dirs[cell])
    expected_losses, expected = outcome(run_dirs[cell[:2]])
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=2e-5, abs=1e-6)  # as divided otherwise
    assert differ(weights, expected) < 1e-4
    assert tokens(run_dirs[cell]) == tokens(run_dirs[cell[:2]])


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell in WATCHED], ids="-".join)
def test_each_keeps_half_for_its_backward_pass(run_dirs, cell):
    alone = kept(run_dirs[cell[:2]], 0)
    print("-".join(cell), alone, [kept(run_dirs[cell], rank) / alone for rank in (0, 1)])
    assert all(kept(run_dirs[cell], rank) < 0.55 * alone for rank in (0, 1))


def kept(run_dir: str, rank: int) -> int:
    return json.loads(Path(run_dir, "cell", f"kept_{rank}.json").read_text())


def tokens(run_dir: str) -> list[float]:
    return [json.loads(line)["num_tokens"] for line in Path(run_dir, "cell", "metrics.jsonl").read_text().splitlines()]
