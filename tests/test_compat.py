"""A part of the compatibility table, another one each day; `scripts/compat.py` writes all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = 16


@pytest.mark.train
@pytest.mark.slow
def test_a_part_of_the_table_is_as_it_says(tmp_path):
    part = int(time.strftime("%j")) % PARTS + 1
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compat.py", "--part", f"{part}/{PARTS}"],
        capture_output=True, text=True, timeout=600, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = [re.split(r"\s+", line, maxsplit=3) for line in done.stdout.splitlines()]
    assert len(rows) == 4
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for method, peft, distributed, facts in rows:
        trained = "all weights" if peft == "none" else "LoRA"
        assert f"| {method} | {trained} | {distributed} | {facts} |" in page
