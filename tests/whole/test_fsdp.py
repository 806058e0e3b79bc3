"""FSDP2 in two processes on CPUs, which the product refuses: accelerate ignores it there unless told they are GPUs.

The methods that FSDP2 can start; those with a reference of their own die as they are built, for ids that are not
divided meet a reference that is.
"""

from __future__ import annotations

import pytest
from support.cells import job
from support.many import RUN_MANY, differ, outcome, run_many

pytestmark = [pytest.mark.train, pytest.mark.slow]

HOOK = f"""
import runpy

from accelerate import PartialState
from accelerate.utils import DistributedType

from alignctl.stage import build, run
from alignctl.checks import problems

arguments = build.build_arguments

def as_if_on_gpus(settings, *others):
    made = arguments(settings, *others)
    if settings.distributed.type == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made

run.build_arguments = as_if_on_gpus
problems.find_problems = lambda config: []
runpy.run_path({str(RUN_MANY)!r}, run_name="__main__")
"""
CASES = [("sft", "none"), ("sft", "lora"), ("orpo", "none"), ("orpo", "lora"), ("dpo", "lora")]
CONTINUED = ("sft", "none")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "hook.py").write_text(HOOK)
    jobs = {
        (*case, how): job(folder, shared_data, (*case, "auto"), (4, 1, how))
        for case in CASES
        for how in ("ddp", "fsdp2")
    }
    whole = jobs[*CONTINUED, "fsdp2"]
    jobs["continued"] = whole | {"run_dir": whole["run_dir"] + "-again", "continues": whole["run_dir"]}
    jobs["bf16"] = {"run_dir": whole["run_dir"] + "-bf16", "arguments": [*whole["arguments"], "cell.bf16=true"]}
    run_many(folder, list(jobs.values()), 2, folder / "hook.py")
    return {key: outcome(one["run_dir"]) for key, one in jobs.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_saved_weights_are_those_of_ddp(outcomes, case):
    losses, weights = outcomes[*case, "fsdp2"]
    expected_losses, expected = outcomes[*case, "ddp"]
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    assert differ(weights, expected) < 1e-4


def test_a_run_that_is_continued_is_the_same(outcomes):
    losses, weights = outcomes["continued"]
    expected_losses, expected = outcomes[*CONTINUED, "fsdp2"]
    assert losses == expected_losses
    assert (weights == expected).all()


def test_in_mixed_precision_a_float32_model_is_saved(outcomes):
    """What it said while it was trained was computed in bfloat16, to which FSDP2 casts the weights of each layer."""
    losses, weights = outcomes["bf16"]
    expected_losses, expected = outcomes[*CONTINUED, "fsdp2"]
    assert losses == pytest.approx(expected_losses, rel=2e-2)
    assert losses != expected_losses
    assert differ(weights, expected) < 2e-2
