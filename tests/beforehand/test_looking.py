"""Rows of all stages are made ready before the first trains, and refused in the words of the stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.in_process import NeverStops, frozen
from support.models import TINY

from alignctl.beforehand.looking import Line, has_more, look
from alignctl.cache import entries
from alignctl.data.tokenizing import tokenize_prompt
from alignctl.errors import AlignctlError, RequestError
from alignctl.launch.beforehand import look_beforehand
from alignctl.run.files import read_json, write_json
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths
from alignctl.run.state import read_status

pytestmark = pytest.mark.train

SMALL = ("recipe=rlhf_quickstart", "data.limit=32", "data.eval_limit=8", *TINY)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


class Heard:
    """Keeps what a run is told."""

    def __init__(self):
        self.said, self.phases = [], []

    def say(self, text):
        self.said.append(text)

    def progress(self, stage, progress):
        self.phases.append((stage.config.name, progress["phase"]))


def test_rows_of_all_stages_are_ready_and_found(tmp_path):
    """One that starts from an earlier stage reads with the tokenizer that stage is going to leave."""
    plan = frozen(tmp_path / "run", *SMALL)
    scratch = RunPaths(tmp_path / "scratch")
    write_json(scratch.plan, plan.to_dict())
    assert look(scratch, ["sft", "rm", "ppo"], NeverStops()) == []
    for name in ("sft", "rm", "ppo"):
        ledger = read_json(scratch.stage(name).data)
        assert (ledger["train"]["kept"], ledger["train"]["lost"]) == (32, 0)
    made = {entry.path for entry in entries("rows")}
    line = Line(scratch, NeverStops())
    _, rm = line.ready("sft"), line.ready("rm")
    assert {entry.path for entry in entries("rows")} == made
    _, weights = read_stage(scratch, "rm")
    assert not Path(weights["reward_model"]).exists()
    asked = tokenize_prompt(rm.job.tokenizer, rm.rows.dataset[0]["prompt"])
    assert rm.trainer.train_dataset[0]["chosen_ids"][: len(asked)] == asked


def test_what_a_later_stage_would_refuse_is_refused_now(tmp_path):
    """By the command's own process, with what its child found: the stage, the words, the state."""
    plan = frozen(tmp_path / "run", *SMALL, "rehearse=true", "rm.max_length=4", "sft.max_steps=200")
    heard = Heard()
    with pytest.raises(RequestError) as refused:
        look_beforehand(plan, heard)
    (problem,) = refused.value.problems
    assert problem.message.startswith("stage `rm`: 32 of 32 training rows (100 %) are lost: with `rm.max_length=4`")
    assert problem.hint.startswith("set `rm.max_length=")
    assert ("rm", "before training: reading data") in heard.phases
    assert read_status(plan.paths)["stages"]["rm"]["state"] == "failed"
    assert not plan.paths.beforehand.exists()


@pytest.mark.night
def test_rows_that_cannot_be_reached_here_are_left_to_jobs_where_there_are_any(tmp_path):
    away = "rm.data.path=http://127.0.0.1:9/rows.jsonl"
    plan = frozen(tmp_path / "run", *SMALL, away, "rm.eval.judge=null", "rehearse=true", "sft.max_steps=200")
    heard = Heard()
    look_beforehand(plan, heard, most=100)
    assert heard.said[-1].startswith("rows cannot be had here, so the first job looks at them: stage `rm`: http://127")
    assert not plan.paths.beforehand.exists()
    with pytest.raises(AlignctlError, match="cannot be fetched"):
        look_beforehand(plan, heard)


def test_rows_that_a_stage_has_yet_to_make_are_left_to_it(tmp_path):
    plan = frozen(tmp_path / "run", *SMALL)
    stages = plan.to_dict()["stages"]
    stages[1]["config"]["data"] |= {"rows_from": "sft", "path": str(tmp_path / "not_there.jsonl")}
    scratch = RunPaths(tmp_path / "scratch")
    write_json(scratch.plan, plan.to_dict() | {"stages": stages})
    assert look(scratch, ["rm"], NeverStops()) == []


@pytest.mark.parametrize(("most", "more"), [(3, False), (2, True)])
def test_files_with_more_rows_are_known(tmp_path, most, more):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    plan = frozen(tmp_path / "run", *SMALL)
    stage = plan.stages[1]
    data = dataclasses.replace(stage.config.data, path=str(file))
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, data=data))
    scratch = RunPaths(tmp_path / "scratch")
    write_json(scratch.plan, dataclasses.replace(plan, stages=(stage,)).to_dict())
    assert has_more(scratch, ["rm"], most) is more
