"""scripts/learn.py in its short form: every method learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.train, pytest.mark.slow]


def test_every_method_learns(tmp_path, root, shared_data):
    script = [sys.executable, str(root / "scripts" / "learn.py")]
    done = subprocess.run(
        [*script, "--short", "--out", str(tmp_path), "--data", str(shared_data)],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    learnt = re.findall(r"^(\S+) +(\w+) .*: learnt$", done.stdout, re.MULTILINE)
    everything = {"dpo", "ipo", "kto", "orpo", "simpo"}
    assert {method for data, method in learnt if data == "quickstart"} == everything | {"reward", "ppo"}
    assert {method for data, method in learnt if data == "llms_from_scratch_pref"} == everything
