"""FSDP2 in two processes on CPUs, which the product refuses: accelerate ignores it there unless told they are GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.train, pytest.mark.slow]

RUN_MANY = Path(__file__).parents[1] / "scripts" / "run_many.py"
HOOK = f"""
import runpy

from accelerate import PartialState
from accelerate.utils import DistributedType

from alignctl import stage
from alignctl.config import checks

arguments = stage._arguments

def as_if_on_gpus(settings, *others):
    made = arguments(settings, *others)
    if settings.distributed.type == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made

stage._arguments = as_if_on_gpus
checks.find_problems = lambda config: []
runpy.run_path({str(RUN_MANY)!r}, run_name="__main__")
"""
SMALL = (
    "recipe=quickstart", "stages=[sft]", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", "sft.max_steps=4",
    "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64", "model.scratch.vocab_size=400",
    "sft.logging_steps=1", "sft.save_strategy=no", "sft.per_device_train_batch_size=4", "launcher.processes=2",
)  # fmt: skip


def test_losses_and_saved_weights_are_those_of_ddp(tmp_path):
    jobs = [{"run_dir": str(tmp_path / how), "arguments": [*SMALL, f"distributed={how}"]} for how in ("ddp", "fsdp2")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "hook.py").write_text(HOOK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "hook.py", "jobs.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / how / "sft" / "metrics.jsonl").read_text().splitlines()]
        for how in ("ddp", "fsdp2")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    saved = [load_file(tmp_path / how / "sft" / "model" / "model.safetensors") for how in ("ddp", "fsdp2")]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[0].items():
        torch.testing.assert_close(saved[1][name], weight, rtol=0, atol=1e-4)
