"""docs/settings.md is what scripts/settings_page.py makes of the code, and has all of it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from alignctl.config.schema import SECTIONS as OF_STAGES
from alignctl.config.schema import DistributedSettings, LauncherSettings, RunSettings, annotations
from alignctl.config.trl_fields import config_fields
from alignctl.methods.registry import methods

SECTIONS = {**OF_STAGES, "launcher": LauncherSettings, "distributed": DistributedSettings}


@pytest.fixture
def page(root) -> str:
    return (root / "docs" / "settings.md").read_text(encoding="utf-8")


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Default and meaning by key, of the table under a heading."""
    table = page.partition(f"# {heading}\n")[2].partition("\n#")[0]
    cells = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {key.strip("`"): [default, meaning] for key, _, default, meaning in cells}


def test_the_page_is_what_the_script_writes(root, page):
    script = root / "scripts" / "settings_page.py"
    done = subprocess.run([sys.executable, script, "--print"], capture_output=True, text=True, check=True)
    assert done.stdout == page, "run `python scripts/settings_page.py`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_with_its_default(page, section):
    found = rows(page, f"`{section}`")
    assert list(found) == list(annotations(SECTIONS[section]))
    for key, field in zip(found, dataclasses.fields(SECTIONS[section]), strict=True):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = {"None": "null", "True": "true", "False": "false", "???": ""}.get(str(default), str(default))
        assert found[key][0] == shown


def test_every_key_of_the_run(page):
    assert list(rows(page, "Of the run")) == ["stages", "run_dir", "seed", "log_every", "rehearse", "global_batch_size"]
    headings = re.findall(r"^## `(\w+)`$", page, re.MULTILINE)
    assert set(annotations(RunSettings)) == {*rows(page, "Of the run"), *headings}


THEIRS = set().union(
    config_fields("transformers:TrainingArguments"),
    *(config_fields(f"trl.trainer.{name.lower()}_config:{name}Config") for name in ("SFT", "Reward", "DPO", "KTO")),
)


@pytest.mark.parametrize("name", methods())
def test_every_field_of_a_method_that_is_not_theirs(page, name):
    ours = set(config_fields(methods()[name].config_class)) - THEIRS
    assert "engine" in ours
    headings = [
        one for one in re.findall(r"^### (.*)$", page, re.MULTILINE) if one == "Every method" or f"`{name}`" in one
    ]
    assert ours <= {key for heading in headings for key in rows(page, heading)}


def test_every_key_has_a_meaning(page):
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(lines) > 90
    assert [line for line in lines if line.endswith("|  |")] == []
