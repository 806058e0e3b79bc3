"""scripts/show_rows.py prints what a stage would train on, and refuses what `train` would refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import TINY

pytestmark = pytest.mark.train

SCRIPT = Path(__file__).parents[2] / "scripts" / "show_rows.py"


def show(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr[-4000:]
    return done.returncode, done.stdout.splitlines()


def test_rows_ledger_and_question(tmp_path):
    code, lines = show(tmp_path, "--rows", "2", "recipe=sft_quickstart", "data.limit=12", "data.eval_limit=4", *TINY)
    assert code == 0
    start = lines.index("train: 12 rows")
    assert [line.partition(":")[0] for line in lines[start + 1 : start + 5]] == ["   input_ids", "   trained on"] * 2
    assert "eval: 4 rows" in lines
    (ledger,) = (json.loads(line.removeprefix("data.json: ")) for line in lines if line.startswith("data.json: "))
    assert (ledger["train"]["read"], ledger["eval"]["kept"]) == (12, 4)
    assert any(line.startswith("held-out question as asked: ") for line in lines)
    assert any(line.startswith("notice: engine: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_cut_as_they_are_collated(tmp_path):
    code, lines = show(
        tmp_path, "--rows", "4", "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", "data.limit=12",
        "data.eval_limit=4", "data.max_lost=0.9", "dpo.max_length=24", *TINY,
    )  # fmt: skip
    assert code == 0, lines
    ids = [(line.split(":")[0].strip(), json.loads(line[line.rindex("[") :])) for line in lines if "_ids: " in line]
    prompts = [len(found) for name, found in ids if name == "prompt_ids"]
    chosen = [len(found) for name, found in ids if name == "chosen_ids"]
    assert max(p + c for p, c in zip(prompts, chosen, strict=True)) == 24
    assert any(line.startswith("   cut: ") for line in lines)


def test_what_train_refuses_is_refused(tmp_path):
    code, lines = show(tmp_path, "recipe=sft_quickstart", "sft.learning_rte=1")
    assert code == 2
    assert "refused: error: unknown key `sft.learning_rte`" in lines
