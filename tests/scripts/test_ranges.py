"""scripts/ranges.py names the oldest versions that the ranges of a pyproject.toml allow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def oldest(pyproject: Path) -> list[str]:
    script = ROOT / "scripts" / "ranges.py"
    done = subprocess.run([sys.executable, script, pyproject], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("torch>=2.8,<2.15", ["torch==2.8"]),
        ("torch<2.15,>=2.8", ["torch==2.8"]),
        ("trl ~= 1.16", ["trl==1.16"]),
        ("hydra-core==1.3.8", ["hydra-core==1.3.8"]),
        ("trl[vllm]>=1.16", ["trl==1.16"]),
        ("pytest>=9; python_version>='3.11'", ["pytest==9"]),
        ("ruff", []),
        ("ruff; python_version>='3.11'", []),
        ("ruff<1", []),
    ],
)
def test_each_kind_of_range(tmp_path, requirement, expected):
    file = tmp_path / "pyproject.toml"
    file.write_text(f'[project]\ndependencies = ["{requirement}"]\n[project.optional-dependencies]\ndev = []\n')
    assert oldest(file) == expected


def test_what_tests_need_is_among_them():
    found = oldest(ROOT / "pyproject.toml")
    names = [line.partition("==")[0] for line in found]
    assert {"torch", "transformers", "trl", "pytest", "deepspeed"} <= set(names)
    assert len(names) == len(set(names))
