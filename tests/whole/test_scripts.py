"""The benchmarks whose numbers the docs have run: that of README compares the same steps of both."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.processes import HANG_S


@pytest.mark.slow
@pytest.mark.train
def test_preference_benchmark_trains_the_same_rows_with_both(tmp_path, root, shared_data):
    small = ("--rows=4", "--batch=2", "--max-length=128", "--contestant", "TRL", "alignctl")
    command = [sys.executable, root / "scripts" / "bench_preference.py", "--method=dpo", "--data=harmless", *small]
    subprocess.run([*command, f"--json={tmp_path / 'measured.json'}"], check=True, cwd=tmp_path, timeout=HANG_S)
    (result,) = json.loads((tmp_path / "measured.json").read_text())["results"]
    theirs, ours = (result["measured"][name] for name in ("TRL", "alignctl"))
    assert len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)  # float32
    assert theirs["useful_tokens_per_row"] == ours["useful_tokens_per_row"] > 50
    assert ours["rows_per_s"] > 0


@pytest.mark.train
def test_generation_benchmark_prints_a_table(root):
    """Without data or a Hub."""
    small = ("--prompts=2", "--length=3", "--turns=2", "--peft=lora")
    command = [sys.executable, root / "scripts" / "bench_generation.py", *small]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_S)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    measured = {row[0]: float(row[2].replace(",", "")) for row in rows[2:-1]}
    assert list(measured) == ["transformers", "fixed cache, adapters on", "continuous", "generate(), as it comes"]
    assert min(measured.values()) > 0
    assert rows[-1][0] == "limit: every weight read once"
