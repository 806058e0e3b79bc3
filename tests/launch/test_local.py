"""What becomes of stages when one before them is made anew."""

from support.added import add_method

from alignctl.config.compose import compose, read_request
from alignctl.launch.local import _begin_anew_after
from alignctl.plan.plan import make_plan
from alignctl.run.files import write_json
from alignctl.run.state import is_done


class Said(list):
    def say(self, text):
        self.append(text)


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
