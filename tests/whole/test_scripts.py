"""The benchmarks whose numbers the docs have run: that of README compares the same steps of both. What docs/engine.md
says of families of models is what a script finds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from support.processes import HANG_S

STEP = ("--batch=2", "--accumulation=2")
OWN = ("local", "quickstart")
"""Models of the user's and of the recipe's own."""


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.spread(3)
def test_preference_benchmark_trains_the_same_rows_with_both(tmp_path, root, shared_data):
    """Once with real rows; once with made ones, adapters, and a trainer that TRL calls experimental."""
    script = [sys.executable, root / "scripts" / "bench_preference.py", "--model=tiny", "--rows=8", "--max-length=128"]
    (dpo,) = results(tmp_path, [*script, *STEP, "--method=dpo", "--data=harmless", "--contestant", "TRL", "alignctl"])
    theirs, ours = (dpo["measured"][name] for name in ("TRL", "alignctl"))
    assert len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)  # float32
    assert dpo["useful_tokens_per_row"] > 50
    assert ours["rows_per_s"] > 0
    made = ("--data=ultrafeedback", "--method", "simpo", "--peft=lora", "--contestant", "TRL", "alignctl")
    (simpo,) = results(tmp_path, [*script, *STEP, *made])
    theirs, ours = (simpo["measured"][name] for name in ("TRL", "alignctl"))
    # Adapters have done nothing before the first step, so their dropout changes no loss of it.
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.train
def test_a_contestant_that_fails_is_told_of(tmp_path, root, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_SHARED", str(tmp_path))  # where there are no rows
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = [sys.executable, root / "scripts" / "bench_preference.py", "--method=dpo", "--data=harmless"]
    (nothing,) = results(tmp_path, [*script, "--contestant", "TRL"])
    assert nothing["measured"] == {}
    assert "exit code 1: ConnectionError" in nothing["failed"]["TRL"]


@pytest.mark.night
@pytest.mark.train
def test_rl_benchmark_makes_the_same_updates_with_both(tmp_path, root):
    small = ("--model=tiny", "--turns=2", "--prompt-length=16", "--length=8", "--method=rloo", "--part=update")
    (rloo,) = results(tmp_path, [sys.executable, root / "scripts" / "bench_rl.py", *small])
    assert rloo["largest_norm_difference"] < 1e-4
    assert min(one["completions_per_s"] for one in rloo["measured"].values()) > 0
    assert rloo["memory"] > 0


@pytest.mark.night
@pytest.mark.train
def test_reading_benchmark_makes_all_rows_ready(tmp_path, root):
    found = results(tmp_path, [sys.executable, root / "scripts" / "bench_reading.py", "--gb=0.002"])
    assert [one["ready"] for one in found] == [one["rows"] for one in found]
    assert found[-1]["bytes"] >= 2_000_000
    assert all(one["looked_at_and_tokenised_s"] > 0 and one["peak_mb"] > 0 for one in found)


def results(folder, command):
    file = folder / "measured.json"
    subprocess.run([*command, f"--json={file}"], check=True, cwd=folder, timeout=HANG_S)
    return json.loads(file.read_text())["results"]


@pytest.mark.train
@pytest.mark.spread(3)
def test_how_families_are_computed_is_what_the_page_says(root):
    """For each model that conf/ has, too."""
    command = [sys.executable, root / "scripts" / "families.py"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_S)
    page = (root / "docs" / "engine.md").read_text(encoding="utf-8")
    assert done.stdout in page, "put what `python scripts/families.py` prints into docs/engine.md"
    sys.path.insert(0, str(root / "scripts"))
    try:
        from families import FAMILIES
    finally:
        sys.path.pop(0)
    paths = {OmegaConf.load(file).path for file in (root / "conf" / "model").glob("*.yaml") if file.stem not in OWN}
    assert paths == {path for family in FAMILIES for path in family.of}


@pytest.mark.train
@pytest.mark.spread(3)
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
