"""What becomes of stages when one before them is made anew, and of processes when others fail."""

import dataclasses
import time

import pytest
from support.added import add_method

from alignctl.config.compose import compose, read_request
from alignctl.errors import AlignctlError
from alignctl.launch import local
from alignctl.launch.local import _begin_anew_after
from alignctl.plan.plan import make_plan
from alignctl.run.files import write_json
from alignctl.run.state import is_done


class Said(list):
    def say(self, text):
        self.append(text)

    def progress(self, stage, progress):
        pass


def test_what_stands_on_a_stage_that_begins_anew_does_so_too(tmp_path, monkeypatch):
    add_method(monkeypatch, "pick", "sft", product="rows", makes="demonstrations")
    config, problems = compose(
        read_request(
            [
                "recipe=sft_dpo_ppo_quickstart", "sft.method=pick", "rm.from=null", "dpo.from=null",
                "dpo.data.from=sft",
            ]
        )
    )  # fmt: skip
    assert not problems
    plan = make_plan(config, "r", tmp_path)
    for stage in plan.stages:
        folders = plan.paths.stage(stage.config.name)
        write_json(folders.result, {})
        folders.model.mkdir()
    by_name = {stage.config.name: stage for stage in plan.stages}
    assert by_name["ppo"].config.start_from == "dpo"
    said = Said()
    _begin_anew_after(plan, by_name["dpo"], said)
    assert {name: is_done(plan.paths.stage(name)) for name in by_name} == {
        "sft": True, "rm": True, "dpo": True, "ppo": False,
    }  # fmt: skip
    assert said == ["dpo: the rows of `sft` are others now, so it begins anew, and after it `ppo`"]


def test_what_we_kill_ourselves_was_not_out_of_memory(tmp_path, monkeypatch):
    """A machine whose processes do not end though those of another have failed."""
    monkeypatch.setattr(local, "_LAST_WORDS_S", 1)
    config, _ = compose(read_request(["recipe=quickstart", "launcher=slurm", "launcher.nodes=2", "distributed=ddp"]))
    plan = make_plan(config, "r", tmp_path)
    paths = plan.paths.stage("sft")
    failed = f"mkdir -p {paths.ranks}; echo {{}} >{paths.exit_codes(1)}; echo waits; sleep 60"
    stage = dataclasses.replace(plan.stages[0], command=("sh", "-c", failed))
    began = time.monotonic()
    with pytest.raises(AlignctlError, match="those on this machine did not end by themselves; the end of") as raised:
        local._wait(stage, paths, tmp_path / "log", Said())
    assert time.monotonic() < began + 30
    assert "signal" not in str(raised.value)
    assert "waits" in str(raised.value)
