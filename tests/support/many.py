"""Many small runs in the same processes (scripts/run_many.py), and what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from support.processes import torchrun

if TYPE_CHECKING:
    import torch

RUN_MANY = Path(__file__).parents[2] / "scripts" / "run_many.py"


def run_many(folder: Path, jobs: list[dict], processes: int, script: Path = RUN_MANY) -> None:
    """Runs all jobs, one after another, in one process or in several that work together.

    Args:
        jobs: As scripts/run_many.py takes them.
        script: What runs them, where it is not run_many.py itself.
    """
    file = folder / f"jobs_{processes}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *torchrun(processes), script, file], cwd=folder, capture_output=True, text=True, timeout=3600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    first = done.stderr.find("Traceback")  # torchrun's own comes last
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]  # of each process
    assert done.returncode == 0, "\n".join([done.stderr[first : first + 8000], *errors])
    refused = [line for line in map(json.loads, Path(f"{file}.done").read_text().splitlines()) if line["error"]]
    assert not refused, refused


def outcome(run_dir: str) -> tuple[list[float], torch.Tensor]:
    """Losses, and all weights as one vector, of a run of one stage."""
    import torch
    from safetensors.torch import load_file

    (stage,) = (path for path in Path(run_dir).iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    files = sorted((stage / "model").glob("*.safetensors"))  # several where processes divide the model
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return [row["loss"] for row in rows], torch.cat([weights[name].flatten().float() for name in sorted(weights)])


def differ(weights: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two runs came to differ, as a part of the weights.

    AdamW makes steps of about the learning rate whatever the size of a gradient, so rounding can show where one is next
    to nothing: a part in a thousand of what was moved is float32's noise, a wrong scale is a hundred times that.
    """
    return float((weights - expected).norm() / expected.norm())
