"""The held-out loss is the loss of one optimizer step over all held-out rows, and training can stop by it."""

from __future__ import annotations

import pytest
from support.files import metrics, read
from support.in_process import StopsAfter, run_stages
from support.many import run_many
from support.methods import METHODS, small_run
from support.small import Small

from alignctl.errors import RequestError, Stopped
from alignctl.methods.registry import methods

pytestmark = pytest.mark.train

COUNT = 7  # no multiple of a batch, nor of two processes
PAIRS = {
    "dpo": {"": {}, " and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}},
    "reward": {"": {}, ", centred": {"center_rewards_coefficient": 0.1}},
    "sft": {"": {}, ", smoothed": {"label_smoothing_factor": 0.1}, ", dft": {"loss_type": "dft"}},
    "simpo": {"": {}, " and sft": {"sft_weight": 0.5}},
    "kto": {
        "": {},
        ", no estimate": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.3, "undesirable_weight": 0.7},
    },
}
EVALUATED = [name for name, method in methods().items() if method.data_kind != "prompts"]
CASES = {name + label: (name, more) for name in EVALUATED for label, more in PAIRS.get(name, {"": {}}).items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_held_out_loss_is_that_of_one_step(small, case, engine):
    name, more = CASES[case]
    rows = small.rows(methods()[name].data_kind, COUNT)
    given = {"engine": engine, "logging_nan_inf_filter": False, "save_strategy": "no", "logging_steps": 1} | more
    if "reference" in methods()[name].roles:
        given["precompute_ref_log_probs"] = False

    def build(size):
        trainer = small.trainer(
            name, rows=rows, held=rows, per_device_eval_batch_size=size, max_steps=1, learning_rate=1e-9,
            per_device_train_batch_size=2 * COUNT, **given,
        )  # fmt: skip
        if trainer.ref_model is not None:  # else all log-ratios are 0
            for parameter in trainer.ref_model.parameters():
                parameter.data.mul_(1.2)
        return trainer

    one = build(1)
    one.train()
    expected = next(row["loss"] for row in one.state.log_history if "loss" in row)
    found = {size: build(size).evaluate() for size in (1, 3, 2 * COUNT)}
    assert [found[size]["eval_loss"] for size in found] == pytest.approx([expected] * 3, rel=2e-6)
    names = {"eval_rewards/accuracies", "eval_rewards/margins", "eval_accuracy", "eval_mean_token_accuracy"}
    if name != "kto":  # TRL counts wanted and unwanted ones of a batch by themselves
        for metric in names & set(found[1]):
            if methods()[name].data_kind == "demonstrations" or metric != "eval_mean_token_accuracy":
                assert found[1][metric] == pytest.approx(found[3][metric], abs=1e-6), metric


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_sets_are_measured_by_name_in_the_same_pass(small, name):
    """Each as if it were there alone, and all of them as ever."""
    rows = small.rows(methods()[name].data_kind, COUNT)
    trainer = small.trainer(name, rows=rows, held=rows, per_device_eval_batch_size=2, save_strategy="no")
    if trainer.ref_model is not None:  # else all log-ratios are 0
        for parameter in trainer.ref_model.parameters():
            parameter.data.mul_(1.2)
    whole = trainer.evaluate()
    sets = {"maths": [4, 1, 0], "chat": [2, 3, 5, 6], "none": []}
    alone = {of: trainer.evaluate(trainer.eval_dataset.select(own)) for of, own in sets.items() if own}
    trainer.held_out_sets = sets
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert alone["maths"]["eval_loss"] != pytest.approx(alone["chat"]["eval_loss"], rel=1e-3)
    metric = {"dpo": "logps/chosen", "sft": "entropy"}[name]
    _, *logged, named = (row for row in trainer.state.log_history if "eval_loss" in row)
    for of, row in zip(alone, logged, strict=True):
        assert found[f"eval_{of}_loss"] == pytest.approx(alone[of]["eval_loss"], rel=1e-6)
        assert named[f"eval_{of}_{metric}"] == pytest.approx(row[f"eval_{metric}"], rel=1e-6)
    assert "eval_none_loss" not in found
    losses = trainer.held_out_losses()
    expected = {key: found[f"eval_{key}"] for key in ("loss", "maths_loss", "chat_loss")}
    assert {key: loss.value for key, loss in losses.items()} == pytest.approx(expected)
    assert {key: sum(loss.adds) for key, loss in losses.items()} == pytest.approx(expected)
    assert {key: len(loss.adds) for key, loss in losses.items()} == {"loss": 4, "maths_loss": 2, "chat_loss": 2}


@pytest.mark.slow
def test_processes_measure_the_same(tmp_path, shared_data):
    """7 held-out rows, by two processes in batches of 2: none is counted twice."""
    jobs = {}
    for name in ("sft", "orpo", "reward"):
        row, kind = METHODS[name], methods()[name].data_kind
        source = "sft/llms_from_scratch" if kind == "demonstrations" else "preference/llms_from_scratch_pref"
        jobs[name] = [
            f"recipe={row.local}", f"model.path={shared_data / 'models/stories260K'}",
            f"data.path={shared_data / source / 'train.jsonl'}", "data.limit=39", f"data.eval_rows={COUNT}",
            "eval.prompts=0", "eval.batch_size=2",
            *(f"{row.stage}.{key}={value}" for key, value in {
                "max_length": 256, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "bf16": "false",
                "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-4, "save_strategy": "no",
            }.items()),
        ]  # fmt: skip
    two = [f"{METHODS[name].stage}.per_device_train_batch_size=2" for name in jobs]
    run_many(
        tmp_path,
        [
            {
                "run_dir": str(tmp_path / f"{name}-2"),
                "arguments": [*given, halved, "distributed=ddp", "launcher.processes=2"],
            }
            for (name, given), halved in zip(jobs.items(), two, strict=True)
        ],
        2,
    )
    for name, given in jobs.items():
        run_stages(tmp_path / f"{name}-1", *given)
        stage = METHODS[name].stage
        alone, together = (
            [row["eval_loss"] for row in metrics(tmp_path / f"{name}-{count}" / stage) if "eval_loss" in row]
            for count in (1, 2)
        )
        assert len(alone) == 2
        if name != "orpo":  # whose training takes a mean over the tokens of a micro-batch
            assert together == pytest.approx(alone, rel=2e-5)
        assert together[0] == pytest.approx(alone[0], rel=1e-3)


def stopping(tmp_path, *more, **settings):
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2, "max_steps": 30}
    return small_run("sft", *more, **given | {"learning_rate": 0.3, "lr_scheduler_type": "constant"} | settings)


def test_stops_early_and_keeps_the_best(tmp_path):
    arguments = stopping(tmp_path, load_best_model_at_end=True)
    stage = run_stages(tmp_path / "run", *arguments) / "sft"
    losses = [row["eval_loss"] for row in metrics(stage) if "eval_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30, "two evaluations without a better one, and no step more"
    result = read(stage / "result.json")
    assert result["steps"] == len(losses)
    assert result["after"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    notices = read(stage / "progress.json")["notices"]
    assert any(f"stopped early after step {len(losses)} of 30" in notice for notice in notices)


def test_early_stopping_counts_on_where_a_run_is_continued(tmp_path):
    arguments = stopping(tmp_path)
    whole = [
        row["eval_loss"] for row in metrics(run_stages(tmp_path / "whole", *arguments) / "sft") if "eval_loss" in row
    ]
    with pytest.raises(Stopped):  # one evaluation has been worse by then
        run_stages(tmp_path / "cut", *arguments, signal=StopsAfter(len(whole) - 1))
    cut = run_stages(tmp_path / "cut", *arguments) / "sft"
    assert [row["eval_loss"] for row in metrics(cut) if "eval_loss" in row] == whole
    (cut / "result.json").unlink()
    again = run_stages(tmp_path / "cut", *arguments) / "sft"  # killed after its last checkpoint
    assert read(again / "result.json")["steps"] == len(whole)


def test_a_metric_that_is_not_measured(tmp_path):
    arguments = stopping(tmp_path, metric_for_best_model="acuracy")
    with pytest.raises(RequestError, match="`metric_for_best_model=acuracy` is not measured") as caught:
        run_stages(tmp_path, *arguments)
    assert "`mean_token_accuracy`" in str(caught.value)
