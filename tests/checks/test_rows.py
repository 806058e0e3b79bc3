"""Rows that one stage makes and another reads: whose, of which kind, and beside which other settings."""

from __future__ import annotations

import pytest
from support.added import add_method

from alignctl.checks.problems import find_problems
from alignctl.cli.main import main
from alignctl.config.compose import compose, read_request
from alignctl.config.stages import merged_section


@pytest.fixture(autouse=True)
def picks(monkeypatch):
    """A method that makes preferences."""
    add_method(monkeypatch, "pick", "sft", product="rows", makes="preferences")


# Of a stage `sft` that makes preferences, and no model, and of `dpo`, which reads them.
ROWS = ("recipe=sft_dpo_quickstart", "eval=default", "sft.method=pick", "dpo.from=null", "dpo.data.from=sft")
BAD_ROWS = [
    ([*ROWS, "dpo.from=sft"], ["`dpo.from=sft`, but `sft` makes rows and no model", "`dpo.data.from=sft`"]),
    ([*ROWS, "dpo.reference=sft"], ["`dpo.reference=sft`, but `sft` makes rows and no model"]),
    (
        [*ROWS, "+stage@ppo=ppo_quickstart", "stages=[sft,ppo]", "ppo.reward_model=sft"],
        ["`ppo.reward_model=sft`, but `sft` makes rows and no model"],
    ),
    ([*ROWS, "dpo.data.path=x/y"], ["`dpo.data.from` and `dpo.data.path` exclude each other", "take `dpo.data.path`"]),
    (
        [*ROWS, "dpo.data.split=train", "dpo.data.name=main", "dpo.data.holds=preferences"],
        ["`dpo.data.from` and `dpo.data.name`, `dpo.data.split`, `dpo.data.holds` exclude each other"],
    ),
    ([*ROWS, "dpo.data.eval_split=test"], ["`dpo.data.from` and `dpo.data.eval_split` exclude each other"]),
    ([*ROWS, "stages=[dpo,sft]"], ["`dpo.data.from=sft`, but `sft` runs after `dpo`", "put `sft` first"]),
    (
        [*ROWS, "stages=[dpo]"],
        ["`dpo.data.from=sft`, but `sft` is not in `stages` (dpo)", "name rows with `dpo.data.path=...`"],
    ),
    ([*ROWS, "dpo.data.from=stf"], ["`stf` is not in `stages`", "did you mean `dpo.data.from=sft`"]),
    ([*ROWS, "dpo.data.from=dpo"], ["`dpo.data.from=dpo`: a stage cannot read the rows that it makes"]),
    ([*ROWS, "stages=[7,dpo]"], ["`stages` must be a list of texts", "`sft` is not in `stages` (dpo)"]),
    ([*ROWS, "dpo.data.from=5"], ["`dpo.data.from` must be text or null"]),
    ([*ROWS, "dpo.data.frm=sft"], ["unknown key `dpo.data.frm`", "`dpo.data.from`"]),
    (
        [*ROWS, "sft.method=sft"],
        ["`dpo.data.from=sft`, but `sft` makes a model and no rows", "to start from it: `dpo.from=sft`"],
    ),
    (
        [*ROWS, "dpo.method=sft", "~dpo.beta", "~dpo.loss_type", "~dpo.loss_weights"],
        ["these rows are preferences (two completions", "the method `sft` needs demonstrations"],
    ),
    ([*ROWS, "sft.data.from=dpo"], ["`sft.data.from=dpo`, but `dpo` runs after `sft`"]),
    (
        [*ROWS, "stages=[dpo]", "data.from=sft", "~dpo.data"],
        ["`data.from` and `data.path` exclude each other", "`data.from=sft`, but `sft` is not in `stages`"],
    ),
    (
        [*ROWS, "dpo.data.from=null", "dpo.data.path=x/y", "dpo.data.split=test", "dpo.data.eval_split=test"],
        ["`dpo.data.eval_split=test` is the split that is trained on"],
    ),
    ([*ROWS, "eval=quickstart"], ["`eval.judge=quickstart` can only judge prompts of `builtin:quickstart`"]),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_ROWS, ids=[" ".join(a[5:]) for a, _ in BAD_ROWS])
def test_bad_request(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["train", *arguments, "--dry-run"])
    said = capsys.readouterr()
    assert exited.value.code == 2
    assert said.out == ""
    for text in expected:
        assert text in said.err


def test_a_column_that_is_no_name_is_reported(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    config, _ = compose(read_request(["recipe=orpo_quickstart", f"data.path={rows}", "+data.columns={prompt: 0}"]))
    assert any("`data.columns` must be" in problem.message for problem in find_problems(config))


def test_a_stage_with_rows_of_its_own_reads_them_its_own_way():
    config, _ = compose(
        read_request([*ROWS, "+data.columns={prompt: question}", "+data.template=x", "+data.use=chosen"])
    )
    assert merged_section(config, "dpo", "data") == {"from": "sft"}


@pytest.mark.parametrize("more", [(), ("dpo.method=kto", "dpo.loss_type=kto", "~dpo.loss_weights")], ids=str)
def test_rows_that_do_are_taken_or_what_can_be_made_of_them(more):
    config, problems = compose(read_request([*ROWS, *more]))
    assert problems + find_problems(config) == []
    assert merged_section(config, "dpo", "data") == {"from": "sft"}
    assert merged_section(config, "sft", "data") == {"path": "builtin:quickstart"}
