"""FSDP2 in several processes on CPUs: every method starts, trains as under DDP, saves, and goes on."""

from __future__ import annotations

import pytest
from support.cells import CASES as METHODS
from support.cells import STEPS, job
from support.daily import of_today
from support.many import RUN_MANY, differ, outcome, run_many

WATCHED = f"""
import runpy
import sys

from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard

backward = Accelerator.backward

def watched(self, *args, **options):
    backward(self, *args, **options)
    model = self._models[-1]
    if not isinstance(model, FSDPModule) or self.process_index:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    there = sum(p.grad.to_local().nbytes for p in trained if p.grad is not None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = fully_shard.state(module)._fsdp_param_group
            shares = group.fsdp_params if group else []
            gathered = [p.unsharded_accumulated_grad for p in shares]
            gathered += [p._unsharded_param.grad for p in shares if hasattr(p, "_unsharded_param")]
            there += sum(gradient.nbytes for gradient in gathered if gradient is not None)
    with open("gradients", "a") as file:
        print(there / sum(p.to_local().nbytes for p in trained), file=file)

Accelerator.backward = watched
runpy.run_path({str(RUN_MANY)!r}, run_name="__main__")
"""
"""Notes after each backward pass of the first process how large its gradients are, as a part of its weights."""

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

PRECOMPUTED = "precomputed"
EVERY = [(name, peft) for name in METHODS for peft in ("none", "lora")]
EVERY += [(name, PRECOMPUTED) for name in ("dpo", "ipo", "kto")]
EVERY += [("dpo", "lora_embeddings"), ("sft", "dora")]  # tied embeddings trained beside an adapter; whole weights read
DAILY = [("sft", "lora"), ("dpo", "none"), ("dpo", PRECOMPUTED)]
CONTINUED = ("sft", "none")


def pair(folder, shared_data, case):
    """A case as DDP and as FSDP2 train it."""
    name, peft = case
    adapter = "none" if peft == PRECOMPUTED else peft
    more = ["cell.precompute_ref_log_probs=true"] if peft == PRECOMPUTED else []
    more += [] if "pass_tokens" in METHODS[name][1] else ["cell.pass_tokens=256"]  # several passes a step
    jobs = [job(folder, shared_data, (name, adapter, "auto"), (4, 1, how)) for how in ("ddp", "fsdp2")]
    return [one | {"run_dir": f"{one['run_dir']}-{peft}", "arguments": one["arguments"] + more} for one in jobs]


def run(folder, shared_data, cases, *others):
    """Runs cases and other jobs; what came of each, by case or run directory."""
    jobs = {case: pair(folder, shared_data, case) for case in cases}
    (folder / "watched.py").write_text(WATCHED)
    run_many(folder, [one for both in jobs.values() for one in both] + list(others), 2, folder / "watched.py")
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
    gradients = [float(line) for line in (folder / "gradients").read_text().splitlines()]
    return found | {"again": found[again["run_dir"]], "bf16": found[bf16["run_dir"]], "gradients": gradients}


@pytest.mark.parametrize("case", [*DAILY, CONTINUED], ids="-".join)
def test_losses_and_saved_weights_are_those_of_ddp(daily, case):
    assert_same(daily, case)


def test_gradients_are_divided_in_every_pass_of_a_step(daily):
    steps = (len(DAILY) + 1 + 1) * STEPS + STEPS // 2  # of all runs
    assert len(daily["gradients"]) > 1.2 * steps
    assert max(daily["gradients"]) <= 1.05  # a process has a row more than another of some weights


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


def test_every_method_trains_as_under_ddp(tmp_path, shared_data):
    today = of_today(EVERY, 5)
    outcomes = run(tmp_path, shared_data, today)
    for case in today:
        assert_same(outcomes, case)


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_other_numbers_of_processes_continue(tmp_path, shared_data, peft):
    """From 2 to 4 and back, halfway; to the weights of a run whose processes were always as many."""

    def one(name, processes, continues=None):
        made = job(tmp_path, shared_data, ("sft", peft, "auto"), (8 // processes, 1, "fsdp2"))
        arguments = [one.replace("processes=2", f"processes={processes}") for one in made["arguments"]]
        begun = {"continues": str(tmp_path / continues)} if continues else {}
        return {"run_dir": str(tmp_path / name), "arguments": arguments} | begun

    run_many(tmp_path, [one("two", 2)], 2)
    run_many(tmp_path, [one("four", 4), one("four_after_two", 4, "two")], 4)
    (tmp_path / "jobs_2.json.done").unlink()
    run_many(tmp_path, [one("two_after_four", 2, "four")], 2)
    found = {name: outcome(str(tmp_path / name)) for name in ("two", "four", "four_after_two", "two_after_four")}
    for name, undisturbed in (("four_after_two", "two"), ("two_after_four", "four")):
        assert found[name][0] == pytest.approx(found[undisturbed][0], rel=1e-6)
        assert (found[name][1] - found[undisturbed][1]).abs().max() < 1e-6
