"""Every method learns: scripts/learn.py in its short form; PPO also from a reward function."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.files import read
from support.in_process import run_stages

pytestmark = [pytest.mark.train, pytest.mark.slow]


def test_every_method_learns(tmp_path, root, shared_data):
    script = [sys.executable, str(root / "scripts" / "learn.py")]
    done = subprocess.run(
        [*script, "--short", "--out", str(tmp_path), "--data", str(shared_data)],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    learnt = re.findall(r"^(\S+) +(\w+) .*: learnt$", done.stdout, re.MULTILINE)
    everything = {"dpo", "ipo", "kto", "orpo", "simpo"}
    assert {method for data, method in learnt if data == "quickstart"} == everything | {"reward", "ppo"}
    assert {method for data, method in learnt if data == "llms_from_scratch_pref"} == everything


def test_ppo_learns_what_a_function_rewards(tmp_path):
    """From an SFT model of one epoch, 16 rollouts: mean scores of each four are above those of the four before."""
    run = run_stages(
        tmp_path / "run", "recipe=rlhf_quickstart", "stages=[sft,ppo]", "sft.num_train_epochs=1",
        "sft.save_strategy=no", "data.eval_limit=8", "eval.prompts=0", "ppo.reward_model=null",
        "ppo.normalize_rewards=none", "ppo.reward_funcs=[alignctl.data.quickstart:reward]", "ppo.kl_coef=0.05",
        "ppo.max_steps=16", "ppo.save_strategy=no",
    )  # fmt: skip
    scores = [row["score"] for row in read(run / "ppo" / "metrics.jsonl")]
    means = [sum(scores[i : i + 4]) / 4 for i in range(0, 16, 4)]
    assert means == sorted(means), means
    assert means[-1] > means[0] + 0.15, means
