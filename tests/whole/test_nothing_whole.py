"""Where processes divide a model, none of them ever holds it whole: not to measure, to draw, to train, to save.

Four processes, from a pretrained model with held-out rows; what is counted stands in support/held.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cells import job
from support.daily import of_today
from support.files import read
from support.many import outcome, run_many

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

PROCESSES = 4
DIVIDED = ("fsdp2", "zero3")
HELD = Path(__file__).parents[1] / "support" / "held.py"
# By default DeepSpeed keeps as many weights as this model has: for what comes next, or because they are few.
KEEPS_NOTHING = tuple(
    f"distributed.config.zero_optimization.stage3_{name}=0"
    for name in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
)
CELLS = [(name, peft) for name in ("sft", "dpo", "kto", "reward", "ppo") for peft in ("none", "lora")]
MATRICES = "fsdp2 with matrices"
"""Of each layer divided between two processes, and between two and two of those."""
ALL = [(*cell, how) for how in DIVIDED for cell in CELLS] + [(name, "none", MATRICES) for name in ("dpo", "sft")]
TODAY = of_today(ALL, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared_data):
    """The run directories of the cells, divided and under DDP."""
    folder = tmp_path_factory.mktemp("whole")
    wanted = [*dict.fromkeys((*cell[:2], "ddp") for cell in TODAY), *TODAY]
    jobs = {cell: four(folder, shared_data, *cell) for cell in wanted}
    run_many(folder, list(jobs.values()), PROCESSES, HELD)
    return {cell: one["run_dir"] for cell, one in jobs.items()}


def four(folder: Path, shared_data: Path, name: str, peft: str, how: str) -> dict:
    """A job in four processes."""
    made = job(folder, shared_data, (name, peft, "auto"), (2, 1, how.partition(" ")[0]))
    if how == MATRICES:
        made["run_dir"] += "-matrices"
        made["arguments"].append("distributed.parallelism_config.tp_size=2")
    arguments = [f"launcher.processes={PROCESSES}" if "processes" in one else one for one in made["arguments"]]
    # AdamW's steps are about as long as the learning rate, whatever the gradient: where it is next to nothing, rounding
    # says in which direction. Of large ones it would be seen in the divergence after training.
    arguments.append("cell.learning_rate=1e-4")
    return made | {"arguments": arguments + list(KEEPS_NOTHING if how == "zero3" else ())}


@pytest.mark.parametrize("cell", TODAY, ids="-".join)
def test_a_process_holds_its_share_and_a_layer(outcomes, cell):
    stage = Path(outcomes[cell], "cell")
    for rank in range(PROCESSES):
        held = json.loads((stage / f"held_{rank}.json").read_text())
        # DeepSpeed lets go of embeddings when the backward pass ends, for they are given nothing that has a gradient:
        # of the policy and the value model, which have one in common, those of both.
        layer = held["embeddings"] if cell == ("ppo", "none", "zero3") else held["layer"]
        assert held["peak"] <= held["all"] / PROCESSES + 1.2 * layer, held["where"]


@pytest.mark.parametrize("cell", TODAY, ids="-".join)
def test_all_numbers_are_those_of_processes_that_hold_everything(outcomes, cell):
    divided, whole = outcomes[cell], outcomes[*cell[:2], "ddp"]
    found, expected = (read(Path(one, "cell", "result.json")) for one in (divided, whole))
    assert found["before"] == pytest.approx(expected["before"], rel=1e-5, abs=1e-5)
    assert found["after"] == pytest.approx(expected["after"], rel=1e-5, abs=1e-5)
    assert outcome(divided)[0] == pytest.approx(outcome(whole)[0], rel=1e-5, abs=1e-5)
    if Path(whole, "cell", "samples.jsonl").exists():
        assert read(Path(divided, "cell", "samples.jsonl")) == read(Path(whole, "cell", "samples.jsonl"))
