"""The wheel carries its recipes and works in an environment that has nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.night, pytest.mark.spread(2, by_file=True)]

ROOT = Path(__file__).resolve().parents[2]


def run(*command, folder, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT), folder=folder)
    (path,) = folder.glob("alignctl-*.whl")
    return path


def test_wheel_carries_conf_and_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "recipes"):
        shipped = {f"alignctl/_data/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.yaml")}
        assert shipped
        assert shipped <= names
    assert len([name for name in names if name.endswith(".jinja")]) >= 10, "chat templates"
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


@pytest.mark.slow
@pytest.mark.train
def test_wheel_runs_the_quickstart_in_an_empty_environment(wheel, tmp_path):
    venv, anywhere = tmp_path / "venv", tmp_path / "any where"
    anywhere.mkdir()
    run(sys.executable, "-m", "venv", str(venv), folder=tmp_path)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q"]
    constraints = tmp_path / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    run(*pip, "torch==2.13.0", folder=tmp_path)
    run(*pip, "-c", str(constraints), str(wheel), folder=tmp_path)
    alignctl = str(venv / "bin" / "alignctl")
    assert "quickstart" in run(alignctl, "recipes", folder=anywhere).stdout
    done = run(
        alignctl, "train", "recipe=quickstart", "data.limit=64", "data.eval_limit=16", "eval.prompts=4",
        "sft.max_steps=4", "dpo.max_steps=2", folder=anywhere, OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert "win rate" in done.stdout
    assert list(anywhere.glob("runs/quickstart/*/dpo/model/model.safetensors"))
