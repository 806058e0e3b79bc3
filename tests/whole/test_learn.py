"""Every method learns: scripts/learn.py in its short form, on real pairs too; PPO from a reward function."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.files import read
from support.in_process import run_stages

from alignctl.methods.registry import methods

pytestmark = [pytest.mark.train, pytest.mark.slow]


def learnt(out: Path, root: Path, data: Path, part: str) -> set[str]:
    """Methods that learnt what they had to, in a part of the script."""
    script = [sys.executable, str(root / "scripts" / "learn.py"), "--short", "--part", part]
    done = subprocess.run(
        [*script, "--out", str(out), "--data", str(data)],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^\S+ +(\w+) .*: learnt$", done.stdout, re.MULTILINE))


@pytest.mark.night
@pytest.mark.spread(2)
def test_every_method_learns(tmp_path, root, shared_data):
    """Others than SFT, from an SFT model of the quickstart world."""
    assert learnt(tmp_path, root, shared_data, "quickstart") == set(methods()) - {"sft"}


@pytest.mark.night
@pytest.mark.spread(2)
def test_every_preference_method_learns_from_real_pairs(tmp_path, root, shared_data):
    """From a pretrained model, with rows of llms_from_scratch."""
    on_pairs = {name for name, method in methods().items() if method.data_kind in ("preferences", "feedback")}
    assert learnt(tmp_path, root, shared_data, "llms") == on_pairs - {"reward"}


@pytest.mark.night
@pytest.mark.spread(3)
def test_grpo_learns_to_add(tmp_path, root, shared_data):
    """From exact answers, and a model that says what it was asked one time in four."""
    assert learnt(tmp_path, root, shared_data, "addition") == {"grpo"}


@pytest.mark.night
@pytest.mark.spread(2)
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
