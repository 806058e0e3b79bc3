"""What `alignctl status` shows of a stage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from alignctl.cli.status import _facts, status_command
from alignctl.config.compose import compose, read_request
from alignctl.errors import RequestError
from alignctl.launch.status import StageStatus
from alignctl.plan.freeze import freeze
from alignctl.plan.plan import make_plan
from alignctl.run.files import write_json

STAGE = StageStatus(
    name="sft", method="sft", state="running", job=None, shared=None, attempts=1, step=3, max_steps=9, metrics={},
    seconds_left=None, time_left=None, note="", error=None,
)  # fmt: skip


@pytest.mark.parametrize(("metrics", "shown"), [({"loss": 0.51239}, "0.5124"), ({"loss": None}, ""), ({}, "")], ids=str)
def test_a_loss_that_is_no_number_is_left_out(metrics, shown):
    """Files of a run are strict JSON: NaN is null there."""
    assert _facts(replace(STAGE, metrics=metrics)) == ["", "3/9", shown, "", ""]


def frozen(folder, *arguments, after=None):
    """A run of one stage, which is done if it has measured something."""
    config, problems = compose(read_request(("recipe=dpo_local", "model.path=m", "data.path=d.jsonl", *arguments)))
    assert problems == []
    plan = make_plan(config, "dpo_local", folder)
    freeze(plan, config, [])
    if after:
        stage = plan.paths.stage("dpo")
        stage.model.mkdir(parents=True)
        write_json(stage.result, {"steps": 1, "product": "model", "before": after, "after": after, "certainty": {}})


def test_a_run_shows_what_its_finished_stages_measured(tmp_path, capsys):
    frozen(tmp_path / "run", after={"preference_accuracy": 0.75})
    status_command([tmp_path / "run"], every=False, as_json=False)
    said = capsys.readouterr().out
    assert "dpo_local: stage dpo, on held-out data" in said
    assert "│ preference accuracy │  75.0% │ 75.0% │   │   same │" in said
    status_command([tmp_path / "run"], every=False, as_json=True)
    (dpo,) = json.loads(capsys.readouterr().out)["stages"].values()
    assert dpo["measured"]["after"] == {"preference_accuracy": 0.75}


def test_the_folder_of_a_sweep_compares_its_points(tmp_path, capsys):
    frozen(tmp_path / "sweep" / "dpo.beta=0.1", "dpo.beta=0.1", after={"preference_accuracy": 0.5})
    frozen(tmp_path / "sweep" / "dpo.beta=0.5", "dpo.beta=0.5", after={"preference_accuracy": 0.75})
    frozen(tmp_path / "sweep" / "dpo.beta=0.9", "dpo.beta=0.9")
    status_command([tmp_path / "sweep"], every=False, as_json=False)
    said = capsys.readouterr().out
    runs, points = said.split("sweep: last stage")
    assert [line.split()[1] for line in runs.splitlines()[1:]] == ["done", "done", "waiting"]
    assert [line.split("│")[1:3] for line in points.splitlines() if "│" in line] == [
        [" dpo.beta=0.1 ", "      50.0% "],
        [" dpo.beta=0.5 ", "      75.0% "],
    ]
    status_command([tmp_path / "sweep"], every=False, as_json=True)
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["done", "done", "waiting"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RequestError, match="is not a run directory"):
        status_command([tmp_path], every=False, as_json=False)
