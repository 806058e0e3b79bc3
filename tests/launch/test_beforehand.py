"""When the rows of all stages are looked at before the first trains."""

from __future__ import annotations

import dataclasses

import pytest
from support.in_process import frozen

from alignctl.errors import AlignctlError
from alignctl.launch.beforehand import _known_by, _Patience, is_due, look_beforehand
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.run.files import write_json

PAIR = ("recipe=sft_dpo_quickstart", "rehearse=true")


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        ((*PAIR,), True),
        ((*PAIR, "stages=[sft]"), False),
        ((*PAIR, "rehearse=false"), False),
        ((*PAIR, "sft.max_steps=19"), False),
        ((*PAIR, "sft.max_steps=20"), True),
        ((*PAIR, "data.limit=64"), False),  # a few steps an epoch
        ((*PAIR, "data.limit=6400"), True),
    ],
    ids=str,
)
def test_long_pipelines_are_looked_at(tmp_path, arguments, due):
    assert is_due(frozen(tmp_path / "run", *arguments)) is due


def test_a_run_is_looked_at_once(tmp_path):
    plan = frozen(tmp_path / "run", *PAIR)
    write_json(plan.paths.beforehand, _known_by(plan))
    assert not is_due(plan)
    look_beforehand(plan, watcher=None)  # which would say something


def test_of_two_stages_the_last_one_left_reads_its_own(tmp_path):
    plan = frozen(tmp_path / "run", *PAIR)
    done = plan.paths.stage("sft")
    write_json(done.result, {})
    done.model.mkdir()
    assert not is_due(plan)


def test_what_stands_still_is_ended(tmp_path):
    """A chat template without an end would be waited for for ever."""
    plan = frozen(tmp_path / "run", *PAIR)
    stage = plan.stages[0]
    launcher = dataclasses.replace(stage.config.launcher, stall_timeout=0)
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, launcher=launcher))
    folder = plan.paths.stage("sft")
    heartbeat = Heartbeat(folder, rank=0)
    patience = _Patience(dataclasses.replace(plan, stages=(stage,)), [folder])
    patience.look()
    heartbeat.beat("tokenising")
    patience.look()
    with pytest.raises(AlignctlError, match="tokenising"):
        patience.look()
