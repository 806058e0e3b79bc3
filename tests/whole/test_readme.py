"""Every command of README.md is run; the pages under docs/ name what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from alignctl.config.compose import CONF_DIR
from alignctl.data.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (alignctl .*)$", README, re.MULTILINE)
TRAINING = [command for command in COMMANDS if " train " in command and "--dry-run" not in command]
LIGHT = [command for command in COMMANDS if command not in TRAINING]
# Makes a training command short without changing what it does.
SMALL = ["data.limit=64", "data.eval_limit=16", "eval.prompts=4", "eval.max_new_tokens=16", "dpo.max_steps=2"]
SHORT = {"recipe=quickstart": [*SMALL, "sft.max_steps=3"], "recipe=dpo_local": SMALL}


@pytest.fixture
def folder(tmp_path, shared_data):
    """A user's folder with what the README's commands name."""
    pairs = shared_data / "preference" / "hh_harmless_base"
    (tmp_path / "my_model").symlink_to(shared_data / "models" / "stories260K")
    (tmp_path / "pairs.jsonl").symlink_to(pairs / "train.jsonl")
    (tmp_path / "held_out.jsonl").symlink_to(pairs / "test.jsonl")
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    return tmp_path


def test_readme_has_commands():
    assert len(LIGHT) >= 5
    assert len(TRAINING) >= 3


@pytest.mark.parametrize("command", LIGHT)
def test_light_command(command, alignctl, folder):
    done = alignctl(*shlex.split(command)[1:], folder=folder)
    assert done.code == 0, done.err
    assert done.out


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("command", TRAINING)
def test_training_command(command, alignctl, folder):
    arguments = shlex.split(command)[1:]
    short = next(more for recipe, more in SHORT.items() if recipe in arguments)
    done = alignctl(*arguments, *short, folder=folder)
    assert done.code == 0, done.err
    assert "held-out data" in done.out


@pytest.mark.parametrize("target", re.findall(r"make (\w+)", README.split("alignctl takes")[0]))
def test_make_target_is_there(target):
    """The two commands on top: `make test` is what runs this, so make only says what it would do."""
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"quickstart": "alignctl train recipe=quickstart", "test": "pytest"}[target] in done.stdout


def test_completion_script(alignctl):
    done = alignctl("completion", "bash")
    assert "_ALIGNCTL_COMPLETE" in done.out


def test_pages_name_what_exists():
    data, recipes = ((ROOT / "docs" / page).read_text() for page in ("data.md", "recipes.md"))
    named = re.findall(r"^\| (`[^|]*) \|", data, re.MULTILINE)
    assert {name for cell in named for name in re.findall(r"`(\w+)`", cell)} == set(FORMATS)
    for group, options in re.findall(r"^\| `(\w+)` \| (`[^|]*) \|$", recipes, re.MULTILINE):
        listed = set(re.findall(r"`(\w+)`", options))
        assert listed == {path.stem for path in (CONF_DIR / group).glob("*.yaml")}, group
