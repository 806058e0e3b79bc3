"""Processes that divide the matrices of layers train as those do that divide weights alone, and continue each other's
runs. What they hold, and their numbers beside DDP's, are in test_nothing_whole.py."""

from __future__ import annotations

import pytest
from support.cells import job
from support.many import differ, outcome, run_many

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

PROCESSES = 4
# Of each run: the method, how many divide a matrix, which run it continues halfway, and more settings.
RUNS = {
    "sft": ("sft", 1, None),
    "sft by 2": ("sft", 2, None),
    "sft by 4, which is all": ("sft", 4, None),
    "sft by 2, again": ("sft", 2, "sft by 2"),
    "sft, after 2": ("sft", 1, "sft by 2"),
    "sft by 2, after 1": ("sft", 2, "sft"),
    "sft by 4, after 2": ("sft", 4, "sft by 2"),
    "dpo": ("dpo", 1, None),
    "dpo by 2": ("dpo", 2, None),
    "dpo by 2, after 1": ("dpo", 2, "dpo"),
    "dpo by 2, padded": ("dpo", 2, None, "cell.engine=padded"),
    "dpo by 2, in passes": ("dpo", 2, None, "cell.pass_tokens=256", "cell.activation_checkpointing=true"),
    "sft in bfloat16": ("sft", 1, None, "cell.bf16=true"),
    "sft by 2 in bfloat16": ("sft", 2, None, "cell.bf16=true"),
}
LIKE = {name: "sft in bfloat16" if "bfloat16" in name else name[:3] for name in RUNS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("matrices")
    jobs = []
    for name, (method, size, continues, *more) in RUNS.items():
        made = job(folder, shared_data, (method, "none", "auto"), (2, 1, "fsdp2"))
        made["arguments"] += [
            f"launcher.processes={PROCESSES}", "cell.learning_rate=1e-4", "cell.weight_decay=0.1", *more,
            f"distributed.parallelism_config.tp_size={size}",
        ]  # fmt: skip
        begun = {"continues": str(folder / continues)} if continues else {}
        jobs.append({"run_dir": str(folder / name), "arguments": made["arguments"]} | begun)
    run_many(folder, jobs, PROCESSES)
    return {name: outcome(str(folder / name)) for name in RUNS}


@pytest.mark.parametrize("name", [name for name in RUNS if name != LIKE[name]])
def test_losses_and_weights_are_those_without(outcomes, name):
    (losses, weights), (expected_losses, expected) = outcomes[name], outcomes[LIKE[name]]
    exact = 2e-2 if "bfloat16" in name else 1e-5
    assert losses == pytest.approx(expected_losses, rel=exact)
    assert differ(weights, expected) < exact


def test_a_run_that_is_continued_is_the_same(outcomes):
    (losses, weights), (expected_losses, expected) = (outcomes[name] for name in ("sft by 2, again", "sft by 2"))
    assert losses == expected_losses
    assert (weights == expected).all()
