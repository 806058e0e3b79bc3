"""However a global batch is divided among processes, passes and shards, training is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.train, pytest.mark.slow]

RUN_MANY = Path(__file__).parents[1] / "scripts" / "run_many.py"
SMALL = (
    "recipe=quickstart", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", "log_every=1", "dpo.from=null",
    "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64", "model.scratch.vocab_size=400",
    "dpo.loss_type=sigmoid", "dpo.loss_weights=null",
)  # fmt: skip
STEPS = 4
METHODS = [(method, peft) for method in ("sft", "dpo") for peft in ("none", "lora")]
# Per device, accumulation, and how the processes work together: 8 rows an optimizer step, always.
ALONE = [(8, 1, "none"), (4, 2, "none")]
TOGETHER = [
    (4, 1, "ddp"),
    (2, 2, "ddp"),
    (4, 1, "zero1"),
    (4, 1, "zero2"),
    (2, 2, "zero2"),
    (4, 1, "zero3"),
    (2, 2, "zero3"),
]


def job(folder: Path, case: tuple, division: tuple) -> dict:
    method, peft, engine = case
    per_device, accumulation, how = division
    given = {
        "engine": engine, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3,
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    processes = [] if how == "none" else ["launcher.processes=2"]
    arguments = [
        *SMALL, f"stages=[{method}]", f"peft={peft}", f"distributed={how}", *processes,
        *(f"{method}.{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    return {"run_dir": str(folder / "_".join(map(str, (*case, *division)))), "arguments": arguments}


def run_many(folder: Path, jobs: list[dict], processes: int) -> None:
    """Runs them all in the same processes."""
    file = folder / f"jobs_{processes}.json"
    file.write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *torchrun, RUN_MANY, file], cwd=folder, capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def outcome(job: dict) -> tuple[list[float], torch.Tensor]:
    """Losses, and all weights as one vector."""
    (stage,) = (path for path in Path(job["run_dir"]).iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(stage / "model" / "model.safetensors")
    return [row["loss"] for row in rows], torch.cat([weights[name].flatten() for name in sorted(weights)])


ALL = [((*method, "auto"), how) for method in METHODS for how in ALONE[1:] + TOGETHER]
ALL += [((*method, "padded"), how) for method in METHODS for how in (TOGETHER[0], TOGETHER[5])]
# A third of them, another one each day; all with ALIGNCTL_ALL=1.
PAIRS = ALL if os.environ.get("ALIGNCTL_ALL") else ALL[int(time.strftime("%j")) % 3 :: 3]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    wanted = [*PAIRS, *{(case, ALONE[0]): None for case, _ in PAIRS}]
    jobs = {(case, how): job(folder, case, how) for case, how in wanted}
    run_many(folder, [one for (_, how), one in jobs.items() if how in ALONE], 1)
    run_many(folder, [one for (_, how), one in jobs.items() if how in TOGETHER], 2)
    return {key: outcome(one) for key, one in jobs.items()}


@pytest.mark.parametrize(("case", "how"), PAIRS, ids=lambda part: "-".join(map(str, part)))
def test_losses_and_weights_are_those_of_one_process(outcomes, case, how):
    losses, weights = outcomes[case, how]
    expected_losses, expected = outcomes[case, ALONE[0]]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    # AdamW makes steps of about the learning rate whatever the size of a gradient, so rounding can show where one is
    # next to nothing: a part in a thousand of what was moved is float32's noise, a wrong scale is a hundred times that.
    difference = (weights - expected).norm() / expected.norm()
    assert difference < 1e-4, f"{difference:.2e}"
