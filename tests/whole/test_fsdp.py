"""FSDP2 in several processes on CPUs: every method starts, trains as under DDP, saves, and goes on."""

from __future__ import annotations

import pytest
from support.cells import CASES as METHODS
from support.cells import job
from support.many import differ, outcome, run_many

pytestmark = [pytest.mark.train, pytest.mark.slow]

PRECOMPUTED = "precomputed"
EVERY = [(name, peft) for name in METHODS for peft in ("none", "lora")]
EVERY += [(name, PRECOMPUTED) for name in ("dpo", "ipo", "kto")]
DAILY = [("sft", "lora"), ("dpo", "none"), ("dpo", PRECOMPUTED)]
CONTINUED = ("sft", "none")


def pair(folder, shared_data, case):
    """A case as DDP and as FSDP2 train it."""
    name, peft = case
    adapter = "none" if peft == PRECOMPUTED else peft
    more = ["cell.precompute_ref_log_probs=true"] * (peft == PRECOMPUTED)
    jobs = [job(folder, shared_data, (name, adapter, "auto"), (4, 1, how)) for how in ("ddp", "fsdp2")]
    return [one | {"run_dir": f"{one['run_dir']}-{peft}", "arguments": one["arguments"] + more} for one in jobs]


def run(folder, shared_data, cases, *others):
    """Runs cases and other jobs; what came of each, by case or run directory."""
    jobs = {case: pair(folder, shared_data, case) for case in cases}
    run_many(folder, [one for both in jobs.values() for one in both] + list(others), 2)
    found = {case: [outcome(one["run_dir"]) for one in both] for case, both in jobs.items()}
    return found | {one["run_dir"]: outcome(one["run_dir"]) for one in others}


def assert_same(outcomes, case):
    (expected_losses, expected), (losses, weights) = outcomes[case]
    assert losses == pytest.approx(expected_losses, rel=1e-5)  # sums of float32 in another order
    assert differ(weights, expected) < 1e-5


@pytest.fixture(scope="module")
def daily(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("fsdp")
    (_, whole) = pair(folder, shared_data, CONTINUED)
    again = whole | {"run_dir": whole["run_dir"] + "-again", "continues": whole["run_dir"]}
    bf16 = {"run_dir": whole["run_dir"] + "-bf16", "arguments": [*whole["arguments"], "cell.bf16=true"]}
    found = run(folder, shared_data, [*DAILY, CONTINUED], again, bf16)
    return found | {"again": found[again["run_dir"]], "bf16": found[bf16["run_dir"]]}


@pytest.mark.parametrize("case", [*DAILY, CONTINUED], ids="-".join)
def test_losses_and_saved_weights_are_those_of_ddp(daily, case):
    assert_same(daily, case)


def test_a_run_that_is_continued_is_the_same(daily):
    _, (expected_losses, expected) = daily[CONTINUED]
    losses, weights = daily["again"]
    assert losses == expected_losses
    assert (weights == expected).all()


def test_in_mixed_precision_a_float32_model_is_saved(daily):
    """What it said while it was trained was computed in bfloat16, to which FSDP2 casts the weights of each layer."""
    _, (expected_losses, expected) = daily[CONTINUED]
    losses, weights = daily["bf16"]
    assert losses == pytest.approx(expected_losses, rel=2e-2)
    assert losses != expected_losses
    assert differ(weights, expected) < 2e-2


@pytest.mark.night
def test_every_method_trains_as_under_ddp(tmp_path, shared_data):
    outcomes = run(tmp_path, shared_data, EVERY)
    for case in EVERY:
        assert_same(outcomes, case)
