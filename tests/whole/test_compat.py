"""The compatibility table is as it says: a part of it, another one each night.

`scripts/compat.py` writes it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.daily import of_today
from support.methods import METHODS
from support.processes import HANG_S

pytestmark = [pytest.mark.train, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
CELLS = [line for line in PAGE.splitlines() if line.startswith(tuple(f"| {name} |" for name in METHODS))]
PARTS = of_today([f"{number}/10" for number in range(1, 11)], 10)


def test_every_method_is_in_the_table():
    assert len(CELLS) == len(METHODS) * 10
    assert {line.split(" | ")[0].removeprefix("| ") for line in CELLS} == set(METHODS)


@pytest.mark.night
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_table_is_as_it_says(tmp_path, part):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compat.py", "--part", part],
        capture_output=True, text=True, timeout=6 * HANG_S, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = [re.split(r"\s+", line, maxsplit=3) for line in done.stdout.splitlines()]
    assert len(rows) == len(CELLS) // int(part.partition("/")[2])
    for method, peft, distributed, facts in rows:
        trained = "all weights" if peft == "none" else "LoRA"
        assert f"| {method} | {trained} | {distributed} | {facts} |" in PAGE
