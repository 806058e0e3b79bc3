"""What works together: every method, full and with LoRA, in one process and in two under DDP, DeepSpeed and
FSDP2.

    python scripts/compat.py                      # all cells, and docs/compatibility.md
    python scripts/compat.py --part 3/12          # every twelfth cell from the third on; writes no page
    python scripts/compat.py --digests FILE       # also what weights and losses hash to: whether another version
                                                  # of alignctl comes to the same bits

A cell trains a tiny model on CPUs for a few steps with checkpoints, saves it, loads it with transformers, and trains it
again from its first checkpoint, as if it had been killed there: the weights must be the same bit for bit. A cell that
alignctl's own check refuses holds the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

from alignctl.methods.registry import methods

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PEFT = ("none", "lora")
DISTRIBUTED = ("none", "ddp", "zero2", "zero3", "fsdp2")
COLUMNS = ("train", "save", "load", "resume")
RECIPE = """
defaults:
  - /base
  - /data: quickstart
  - /method@cell: {method}
  - override /model: quickstart
  - _self_
stages: [cell]
data: {{limit: 64, eval_limit: 8}}
eval: {{prompts: 0}}
model: {{scratch: {{vocab_size: 400, config: {{hidden_size: 32, intermediate_size: 64}}}}}}
cell:
  max_steps: 4
  save_steps: 2
  logging_steps: 1
  learning_rate: 1.0e-3
  per_device_train_batch_size: 4
  bf16: false
"""
CUT = "  max_length: 128\n"
_DRAWN = "  response_length: 8\n  max_prompt_length: 64\n  reward_funcs: ['alignctl.data.quickstart:reward']\n"
OWN = {"ppo": _DRAWN} | dict.fromkeys(("grpo", "rloo"), _DRAWN + "  num_generations: 2\n  beta: 0.05\n")


@dataclass(frozen=True)
class Cell:
    method: str
    peft: str
    distributed: str

    @property
    def processes(self) -> int:
        return 1 if self.distributed == "none" else 2

    def jobs(self, folder: Path) -> list[dict]:
        """The run, and the run continued."""
        recipe = folder / f"{self.method}.yaml"
        recipe.write_text(RECIPE.format(method=self.method) + OWN.get(self.method, CUT), encoding="utf-8")
        arguments = [f"recipe={recipe}", f"peft={self.peft}", f"distributed={self.distributed}"]
        if self.processes > 1:
            arguments.append(f"launcher.processes={self.processes}")
        first = str(folder / f"{self.method}_{self.peft}_{self.distributed}")
        again = f"{first}_again"
        return [
            {"run_dir": first, "arguments": arguments},
            {"run_dir": again, "arguments": arguments, "continues": first},
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="N/M: every M-th cell, from the N-th on")
    parser.add_argument("--digests", type=Path, help="file for what the weights and losses of each cell hash to")
    given = parser.parse_args()
    first, step = map(int, given.part.split("/"))
    cells = [Cell(*parts) for parts in product(methods(), PEFT, DISTRIBUTED)][first - 1 :: step]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for processes in (1, 2):
            found |= run([cell for cell in cells if cell.processes == processes], Path(folder), processes)
        if given.digests:
            digests = {f"{cell.method} {cell.peft} {cell.distributed}": digest(cell, Path(folder)) for cell in cells}
            given.digests.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for cell, facts in found.items():
        print(f"{cell.method:8} {cell.peft:5} {cell.distributed:6} {facts}")
    if step == 1:
        PAGE.write_text(page(found), encoding="utf-8")
    broken = [cell for cell, facts in found.items() if "no" in facts.split(" | ")]
    sys.exit(f"{len(broken)} cells are broken: {broken}" if broken else 0)


def run(cells: list[Cell], folder: Path, processes: int) -> dict[Cell, str]:
    """Runs cells that need as many processes, and looks at what is left of each."""
    jobs = [job for cell in cells for job in cell.jobs(folder)]
    done: dict[str, str | None] = {}
    while left := [job for job in jobs if job["run_dir"] not in done]:
        file = folder / f"jobs_{processes}_{len(left)}.json"
        file.write_text(json.dumps(left), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / "scripts" / "run_many.py", file]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with Path(f"{file}.log").open("w", encoding="utf-8") as log:
            subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=environment, check=False)
        lines = Path(f"{file}.done").read_text().splitlines() if Path(f"{file}.done").exists() else []
        done |= {row["run_dir"]: row["error"] for row in map(json.loads, lines)}
        broke = next((job for job in left if job["run_dir"] not in done), None)
        if broke:  # the processes ended in it; the others go on in new ones
            done |= {broke["run_dir"]: "failed", broke["run_dir"] + "_again": "failed"}
            print(f"{broke['run_dir']} failed:\n{Path(f'{file}.log').read_text()[-3000:]}", file=sys.stderr)
    return {cell: look(cell, folder, done) for cell in cells}


def look(cell: Cell, folder: Path, done: dict[str, str | None]) -> str:
    """Which of COLUMNS a cell does, `yes | yes | ...`, or why it is refused."""
    first, again = cell.jobs(folder)
    if done[first["run_dir"]] not in (None, "failed"):
        return f"refused: {done[first['run_dir']]}"
    stage = Path(first["run_dir"], "cell")
    trained = (stage / "metrics.jsonl").exists() and len((stage / "metrics.jsonl").read_text().splitlines()) >= 4
    saved = (stage / "result.json").exists() and bool(weights_of(stage))
    loaded = saved and loads(stage / "model", cell.method == "reward")
    resumed = saved and done[again["run_dir"]] is None and same(stage, Path(again["run_dir"], "cell"))
    return " | ".join("yes" if fact else "no" for fact in (trained, saved, loaded, resumed))


def loads(model: Path, scores: bool) -> bool:
    """Whether transformers takes the saved model as it is: every weight there, none too many, all of them numbers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    loaded, report = loader.from_pretrained(model, output_loading_info=True)
    whole = not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return whole and all(bool(weight.isfinite().all()) for weight in loaded.parameters())


def weights_of(stage: Path) -> bytes:
    """What the files of a finished model hold, one or several."""
    return b"".join(file.read_bytes() for file in sorted((stage / "model").glob("*.safetensors")))


def same(stage: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights and logged the same losses."""
    weights = [weights_of(one) for one in (stage, other)]
    losses = [[json.loads(line).get("loss") for line in (one / "metrics.jsonl").open()] for one in (stage, other)]
    return weights[0] == weights[1] and losses[0] == losses[1]


def digest(cell: Cell, folder: Path) -> str:
    """Of the weights and losses that a cell's run ended with."""
    stage = Path(cell.jobs(folder)[0]["run_dir"], "cell")
    losses = [json.loads(line).get("loss") for line in (stage / "metrics.jsonl").open()]
    return hashlib.sha256(weights_of(stage) + repr(losses).encode()).hexdigest()


def page(found: dict[Cell, str]) -> str:
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    lines = [
        "# What works together",
        "",
        "Written by `python scripts/compat.py`: tiny models in one process and in two, on CPUs (gloo). load: by",
        "transformers, every weight there. resume: as if killed after the second of four steps and continued, to the",
        "same weights bit for bit.",
        "",
        f"Python {platform.python_version()}, {versions}.",
        "",
        "| method | trained | distributed | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for cell, facts in found.items():
        trained = "all weights" if cell.peft == "none" else "LoRA"
        shown = facts if " | " in facts else " | ".join([facts, "", "", ""])
        lines.append(f"| {cell.method} | {trained} | {cell.distributed} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
