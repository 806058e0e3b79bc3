"""What the numbers of a stage advise, and where they advise nothing."""

from types import SimpleNamespace

import pytest

from alignctl.cli.advice import advice
from alignctl.config.schema import EvalSettings
from alignctl.data.settings import DataSettings

SURE = {"n": 200, "before": [0.5, 0.6], "after": [0.5, 0.6], "within_noise": True}
BETTER = SURE | {"within_noise": False}


def said(result=None, rows=None, logged=(), data=None, trainer=None):
    stage = SimpleNamespace(
        name="dpo",
        data=DataSettings(**data or {}),
        eval=EvalSettings(),
        trainer=trainer or {"learning_rate": 5e-7, "num_train_epochs": 1},
    )
    usual = {"before": {"preference_accuracy": 0.6}, "after": {"preference_accuracy": 0.8}}
    usual["certainty"] = {"preference_accuracy": BETTER}
    return advice(stage, usual if result is None else result, rows or {"eval": {"kept": 200}}, logged)


def still(kl, sure=SURE):
    return {
        "before": {"preference_accuracy": 0.6, "kl": 0.0},
        "after": {"preference_accuracy": 0.6, "kl": kl},
        "certainty": {"preference_accuracy": sure, "kl": BETTER | {"before": None, "after": None}},
    }


def test_a_stage_that_went_well_and_one_that_is_not_done_need_none():
    assert said() == []
    assert said(result={}) == []


@pytest.mark.parametrize(
    ("trainer", "typed"),
    [
        (None, "`dpo.learning_rate=2.5e-06` or `dpo.num_train_epochs=3`"),
        ({"max_steps": 100}, "`dpo.max_steps=300`"),
    ],
    ids=["epochs", "steps"],
)
def test_a_model_that_did_not_move(trainer, typed):
    (line,) = said(still(0.003), trainer=trainer)
    assert line == f"the model hardly moved (KL 0.003 nats an answer, accuracy unchanged): {typed}"
    assert said(still(0.5)) == []
    assert said(still(0.003, BETTER)) == []


@pytest.mark.parametrize(("after", "count"), [(2.0001, 1), (1.9, 0)])
def test_a_held_out_loss_that_stays(after, count):
    assert len(said({"before": {"loss": 2.0}, "after": {"loss": after}, "certainty": {}})) == count


@pytest.mark.parametrize(
    ("data", "typed"),
    [
        ({"eval_rows": 12}, "`data.eval_rows=100`"),
        ({"eval_limit": 12}, "`data.eval_limit=null`"),
        ({}, "`data.eval_path=FILE`"),
        ({"eval_path": "few.jsonl"}, "more rows"),
    ],
    ids=str,
)
def test_few_held_out_rows(data, typed):
    (line,) = said(rows={"eval": {"kept": 12}}, data=data)
    assert line.startswith("12 held-out rows say little")
    assert typed in line


def test_held_out_rows_that_training_rows_share_prompts_with():
    (line,) = said(rows={"eval": {"kept": 200, "shared_prompts": 40}})
    assert line.startswith("40 of 200 held-out rows have a prompt that training rows have, too")
    assert line.endswith("`data.eval_path=null data.eval_rows=256`")


def test_saturated():
    assert (
        "99.5% of the pairs were told apart before"
        in said({"before": {"preference_accuracy": 0.995}, "after": {"preference_accuracy": 1.0}, "certainty": {}})[0]
    )
    told = [{"step": n, "loss": 0.1, "rewards/accuracies": 1.0 if n > 3 else 0.5} for n in range(1, 21)]
    for result in (None, still(0.0)):  # no advice to go further beside the advice to stop earlier
        (line,) = said(result, logged=told)
        assert line.startswith("all training pairs are told apart from step 4 of 20 on")
    assert line.endswith("`dpo.learning_rate=1e-07`, or harder pairs")
    alike = {"rewards/a": 1.0, "rewards/a_std": 0.0}
    assert "score the same" in said({"before": alike, "after": alike, "certainty": {}})[0]
    assert said({"before": alike, "after": alike | {"rewards/b_std": 0.5}, "certainty": {}}) == []
    assert said(logged=[row | {"rewards/accuracies": 0.9} for row in told]) == []
    (line,) = said(logged=[{"step": n, "loss": 0.0, "frac_reward_zero_std": 0.95} for n in range(1, 21)])
    assert line.startswith("95% of the prompts have completions that all score the same")
