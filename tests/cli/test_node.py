"""What a machine of a SLURM job leaves when it ends its part."""

import shutil

import pytest

from alignctl.cli import node
from alignctl.config.compose import compose, read_request
from alignctl.launch.local import FolderGone
from alignctl.plan.freeze import freeze
from alignctl.plan.plan import make_plan


@pytest.mark.parametrize("gone", [False, True])
def test_that_a_machine_has_ended_is_left_where_the_run_is_still_there(tmp_path, monkeypatch, gone):
    config, problems = compose(read_request(["recipe=quickstart", "stages=[sft]", "launcher=slurm"]))
    assert not problems
    plan = make_plan(config, "quickstart", tmp_path / "run")
    freeze(plan, config, [])
    paths = plan.paths.stage("sft")
    paths.root.mkdir(exist_ok=True)

    def ends(*_):
        if gone:
            shutil.rmtree(tmp_path / "run")
        raise FolderGone("was removed")

    monkeypatch.setattr(node, "run_stage", ends)
    with pytest.raises(FolderGone):
        node.node_command(tmp_path / "run", "sft", "127.0.0.1:1", "0")
    assert paths.ended(0).exists() != gone
    assert (tmp_path / "run").exists() != gone
