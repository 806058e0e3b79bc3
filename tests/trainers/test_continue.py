"""Every method, stopped in mid-training and continued, ends with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import pytest
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.methods import METHODS, small_run
from support.rewards import REWARDS

from alignctl.errors import Stopped

pytestmark = pytest.mark.train


# Where a method keeps other state than with its usual roles.
OTHER = {
    "ppo, shared base": (
        "ppo", f"ppo.reward_funcs=[{REWARDS}:length]", "ppo.normalize_rewards=none", "ppo.sharing=shared_base",
        "peft=lora", "peft.lora_dropout=0.1", "ppo.disable_dropout=false", "ppo.learning_rate=1e-2",
    ),
}  # fmt: skip
CASES = {name: (name, *row.stateful) for name, row in METHODS.items()} | OTHER


@pytest.mark.parametrize("case", sorted(CASES))
def test_continued_is_undisturbed(tmp_path, monkeypatch, case):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    name, *more = CASES[case]
    stage = METHODS[name].stage
    arguments = small_run(name, *more, rows=64, max_steps=6, save_steps=2, per_device_train_batch_size=16)
    whole = run_stages(tmp_path / "whole", *arguments) / stage
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        run_stages(tmp_path / "cut", *arguments, signal=StopsAfter(3))
    continued = run_stages(tmp_path / "cut", *arguments) / stage
    assert read(continued / "result.json")["steps"] == 6
    assert weights(continued / "model") == weights(whole / "model")
    losses = [[row["loss"] for row in read(folder / "metrics.jsonl") if "loss" in row] for folder in (continued, whole)]
    assert losses[0] == losses[1]
