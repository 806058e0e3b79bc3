"""A stage that makes rows, and DPO on them: run, killed, run again, and with other rows.

alignctl has no method that makes rows; a copy of it gets one here, as somebody would add it who writes one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from support.added import product_with
from support.files import read, weights
from support.models import TINY
from support.processes import HANG_S, wait_until, wait_until_gone, workers

pytestmark = [pytest.mark.train, pytest.mark.spread(2)]

METHOD = '''
"""Keeps some pairs."""

from alignctl.methods.registry import Bound, Method

METHOD = Method(
    name="pick",
    summary="keeps every so many pairs",
    when="in tests",
    paper="https://example.org",
    data_kind="preferences",
    row_columns=(),
    product="rows",
    makes="preferences",
    roles=("policy",),
    spares_reference=None,
    stability="young",
    config_class="alignctl.stage.pick:PickConfig",
    trainer=None,
    stage_function="alignctl.stage.pick:pick",
    mixes_rows=None,
    divides_rows=False,
    owned_fields={},
    key_metrics=(),
    renamed={},
    bounds={"every": Bound(least=1)},
    check=None,
    notices=None,
)
'''
STAGE = '''
"""Reads pairs, and makes a stage's rows of some of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from alignctl.data.reading import read_split
from alignctl.monitor.callbacks import ProgressFile
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.run.files import write_json
from alignctl.run.products import write_rows_product
from alignctl.stage.job import rank


@dataclass
class PickConfig:
    every: int = 2


def pick(stage, weights, paths, signal):
    progress = ProgressFile(paths, (), Heartbeat(paths, rank()))
    progress.phase("reading data")
    rows, _ = read_split(stage.data, "preferences", stage.seed)
    progress.phase("picking")
    first = int(os.environ.get("PICK_FIRST", 0))
    picked = rows.dataset.select(range(first, len(rows.dataset), stage.trainer["every"]))
    made = write_rows_product(paths, slowly(picked), "preferences", stage)
    write_json(paths.result, {"picked": made.count})


def slowly(rows):
    """Does not go on after the second row as long as somebody holds it."""
    for number, row in enumerate(rows, start=1):
        yield row
        while number == 2 and Path(os.environ.get("PICK_HELD", "/no/such/file")).exists():
            Path(os.environ["PICK_HELD"]).with_name("reached").touch()
            time.sleep(0.05)
'''
FILES = {
    "alignctl/methods/pick.py": METHOD,
    "alignctl/stage/pick.py": STAGE,
    "conf/method/pick.yaml": "method: pick\nfrom: null\nevery: 2\n",
    "recipes/pick_dpo.yaml": """\
# Some pairs of the quickstart world, and DPO on them.
defaults: [sft_quickstart, {/method@pick: pick}, {/stage@dpo: dpo_quickstart}, {override /eval: default}, _self_]
stages: [pick, dpo]
dpo: {from: null, max_steps: 2, save_steps: 1, logging_steps: 1, data: {from: pick}}
""",
}
PICK_DPO = ("recipe=pick_dpo", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", *TINY, "run_dir=run")


@pytest.fixture(scope="module")
def product(tmp_path_factory) -> dict[str, str]:
    """The environment in which the copy is what runs."""
    folder = product_with(tmp_path_factory.mktemp("product"), FILES)
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture
def alignctl(product, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "alignctl", *arguments], cwd=tmp_path, env=product | variables,
            capture_output=True, text=True, timeout=HANG_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def test_dpo_on_the_rows_of_a_stage_before_it(alignctl, tmp_path):
    planned = alignctl("train", *PICK_DPO, "--dry-run").stdout
    rows = tmp_path / "run" / "pick" / "rows"
    assert f"data          {rows / 'rows.jsonl'} (made by pick), held out: up to 256 of its rows" in planned
    assert f"output        {rows}" in planned
    assert "makes         preferences" in planned
    assert not (tmp_path / "run").exists()

    done = alignctl("train", *PICK_DPO)
    assert "pick: done in" in done.stderr
    assert f"pick: made 48 rows (preferences): {rows}" in done.stdout
    manifest = read(rows / "manifest.json")
    assert (manifest["kind"], manifest["count"], manifest["stage"]) == ("preferences", 48, "pick")
    assert len(read(rows / "rows.jsonl")) == 48
    stage = tmp_path / "run" / "dpo"
    ledger = read(stage / "data.json")
    assert ledger["train"]["source"] == str(rows / "rows.jsonl")
    assert ledger["train"]["read"] == 48
    assert ledger["train"]["kept"] + ledger["eval"]["kept"] == 48
    assert read(stage / "inputs.json") == {"rows_from": "pick", "files": manifest["files"]}

    status = json.loads(alignctl("status", "run", "--json").stdout)
    assert {name: one["state"] for name, one in status["stages"].items()} == {"pick": "done", "dpo": "done"}
    assert "pick" in alignctl("status", "run").stdout
    first = weights(stage / "model")
    again = alignctl("train", *PICK_DPO, "--json")
    assert "already finished" in again.stderr
    summary = json.loads(again.stdout)["stages"]
    assert summary["pick"]["made"] == {
        "folder": str(rows), "kind": "preferences", "count": 48, "columns": ["prompt", "chosen", "rejected"],
    }  # fmt: skip
    assert "model" not in summary["pick"]
    assert summary["dpo"]["steps"] == 2

    shutil.rmtree(rows)  # made again, the same: the model of them stays
    assert "dpo: starts" not in alignctl("train", *PICK_DPO).stderr
    assert len(read(rows / "rows.jsonl")) == 48

    shutil.rmtree(rows)  # made again, others: the model of them does not
    other = alignctl("train", *PICK_DPO, PICK_FIRST="1").stderr
    assert "dpo: starts" in other
    assert read(stage / "inputs.json")["files"] == read(rows / "manifest.json")["files"] != manifest["files"]
    assert weights(stage / "model") != first
    assert [row["step"] for row in read(stage / "metrics.jsonl")][:2] == [1, 2]
    assert "already finished" in alignctl("train", *PICK_DPO).stderr

    refused = alignctl("train", *PICK_DPO, "stages=[dpo]", code=2).stderr
    assert "`dpo.data.from=pick`, but `pick` is not in `stages` (dpo)" in refused
    changed = alignctl("train", *PICK_DPO, "pick.every=3", code=2).stderr
    assert "holds a run whose stage `pick` was begun otherwise: `pick.every`: 2 -> 3" in changed


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_killed_while_it_writes_it_leaves_no_half_of_its_rows(product, tmp_path, victim, alignctl):
    held, rows = tmp_path / "held", tmp_path / "run" / "pick" / "rows"
    held.touch()
    arguments = (*PICK_DPO, "stages=[pick]")
    run = subprocess.Popen(
        [sys.executable, "-P", "-m", "alignctl", "train", *arguments], cwd=tmp_path,
        env=product | {"PICK_HELD": str(held)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_until((tmp_path / "reached").exists, "no row is written", run)
    assert json.loads(alignctl("status", "run", "--json").stdout)["stages"]["pick"]["state"] == "running"
    os.kill(workers(tmp_path)[0] if victim == "worker" else run.pid, signal.SIGKILL)
    run.communicate(timeout=HANG_S)
    wait_until_gone(tmp_path)
    assert not rows.exists()
    held.unlink()
    done = alignctl("train", *arguments)
    assert f"pick: made 48 rows (preferences): {rows}" in done.stdout
    assert len(read(rows / "rows.jsonl")) == read(rows / "manifest.json")["count"] == 48
    left = {path.name for path in (tmp_path / "run" / "pick").iterdir()}
    assert left == {"rows", "result.json", "logs", "ranks", "progress.json"}
