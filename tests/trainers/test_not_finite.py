"""Training stops where a loss, gradient or weight is no number, saves nothing of it, and names the rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from support.added import add_method
from support.files import read, write_rows
from support.in_process import run_stages
from support.methods import METHODS, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.data.quickstart import preferences
from alignctl.errors import AlignctlError
from alignctl.methods.registry import RowColumn, methods
from alignctl.run.checkpoints import complete_checkpoints
from alignctl.trainers.base.not_finite import NotFinite
from alignctl.trainers.preference.simpo import SimPOTrainer

pytestmark = pytest.mark.train


def arguments(name):
    """A stage of one epoch over 40 rows, 8 of them at a time."""
    return METHODS[name].stage, small_run(name, max_steps=5, save_strategy="no")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_diverges(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    stage, given = arguments(name)
    given += (f"{stage}.learning_rate=1e30", f"{stage}.lr_scheduler_type=constant", f"{stage}.max_grad_norm=0")
    with pytest.raises(AlignctlError, match="is not finite, and training was stopped") as caught:
        run_stages(tmp_path, *given)
    assert caught.value.exit_code == 1
    assert f"`{stage}.learning_rate`" in caught.value.problems[0].hint
    found = read(tmp_path / stage / "not_finite.json")
    assert found["step"] in (1, 2, 3), found
    (batch,) = found["batches"]
    # Both completions of a pair may be in a batch, and several that are drawn to one prompt.
    of_one = 2 if methods()[name].data_kind == "feedback" else 4 if f"{stage}.num_generations=4" in given else 1
    assert len(set(batch["rows"])) >= 8 // of_one
    assert set(batch["rows"]) <= set(range(1, 41))
    assert not (tmp_path / stage / "model").exists()


class OddTrainer(SimPOTrainer):
    """Multiplies and shifts the loss by what the rows say, looking at nothing."""

    def pair_loss(self, chosen, rejected, row):
        found = super().pair_loss(chosen, rejected, row)
        return replace(found, loss=found.loss * torch.tensor(row["scale"]).mean() + torch.tensor(row["shift"]).sum())


def poisoned(folder, row, column):
    """41 pairs, of which the first cannot be used, and one row has no number in a column."""
    pairs = preferences("train")[:40]
    rows = [pair | {"scale": 1.0, "shift": 0.0} for pair in [pairs[0] | {"chosen": []}, *pairs]]
    rows[row - 1][column] = math.nan
    file = folder / "pairs.parquet"
    Dataset.from_list(rows).to_parquet(file)  # JSON knows neither NaN nor infinity
    return file


@pytest.mark.parametrize(("column", "what"), [("scale", "the gradient"), ("shift", "the loss")])
def test_an_odd_row_is_named_by_its_number_in_the_file(tmp_path, monkeypatch, column, what):
    """The first row of the file is left out; it counts all the same."""
    columns = tuple(RowColumn(name=name, number=False, missing=0.0) for name in ("scale", "shift"))
    add_method(monkeypatch, "odd", "simpo", row_columns=columns, trainer=f"{__name__}:OddTrainer")
    file = poisoned(tmp_path, 17, column)
    _, given = arguments("simpo")
    given += (
        "simpo.method=odd", f"data.path={file}", "data.eval_rows=0", "data.limit=null", "simpo.save_strategy=steps",
        "simpo.save_steps=1", "simpo.logging_steps=2", "eval.judge=null",
    )  # fmt: skip
    with pytest.raises(AlignctlError, match=f"{what} of step \\d is not finite") as caught:
        run_stages(tmp_path / "run", *given)
    found = read(tmp_path / "run" / "simpo" / "not_finite.json")
    (batch,) = found["batches"]
    assert 17 in batch["rows"]
    assert len(batch["rows"]) == 8
    assert found["data"] == str(file)
    saved = complete_checkpoints(tmp_path / "run" / "simpo" / "checkpoints")
    assert [one.step for one in saved] == list(range(1, found["step"]))[-2:]
    assert ("there is no checkpoint yet" in str(caught.value)) == (not saved)


def test_weights_that_are_no_numbers_are_not_saved(small):
    trainer = small.trainer("sft", max_steps=1, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[3, 3] = torch.inf
    with pytest.raises(NotFinite, match="a weight"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(small.folder.glob("checkpoint-*"))


def test_packed_rows_are_written_down_as_text(tmp_path):
    _, given = arguments("sft")
    given += ("sft.packing=true", "sft.learning_rate=1e30", "sft.lr_scheduler_type=constant", "sft.max_steps=3")
    with pytest.raises(AlignctlError, match="is not finite"):
        run_stages(tmp_path, *given, "sft.per_device_train_batch_size=2")
    (batch,) = read(tmp_path / "sft" / "not_finite.json")["batches"]
    assert batch["rows"] == []
    assert any("?" in text for text in batch["texts"])


def too_large(folder, shared_data):
    """The pretrained model with weights that are finite, and logits that are not."""
    model = AutoModelForCausalLM.from_pretrained(shared_data / "models/stories260K")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared_data / "models/stories260K").save_pretrained(folder)
    return folder


def stage_of(name, model, files, *more, **settings):
    """One step of a method on a model and rows of one's own."""
    row, kind = METHODS[name], methods()[name].data_kind
    given = {"max_length": 96, "per_device_train_batch_size": 8, "max_steps": 1} | settings
    return (
        f"recipe={row.local}", f"model.path={model}", f"data.path={files[kind]}", "data.eval_rows=8",
        "eval.max_new_tokens=4", *(f"{row.stage}.{key}={value}" for key, value in given.items()), *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of each kind."""
    folder = tmp_path_factory.mktemp("rows")
    prompts = [{"prompt": f"Once upon a time {n}"} for n in range(32)]
    told = [prompt | {"completion": " there was a dog."} for prompt in prompts]
    chosen = [prompt | {"chosen": " there was a dog.", "rejected": " there was no dog at all."} for prompt in prompts]
    labelled = [row | {"label": bool(n % 2)} for n, row in enumerate(told)]
    rows = {"demonstrations": told, "preferences": chosen, "feedback": labelled}
    return {kind: write_rows(folder / f"{kind}.jsonl", some) for kind, some in rows.items()}


AFTER = "training has spoilt the model, and it is not saved: .* not finite"


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto"])
def test_weights_that_grew_too_large_in_the_last_step(shared_data, tmp_path, files, name):
    """Loss, gradient and weights were finite all along: only measuring shows it."""
    model = shared_data / "models/stories260K"
    prompts = 0 if name == "dpo" else 4
    arguments = stage_of(name, model, files, f"eval.prompts={prompts}", learning_rate=1e18, save_steps=1)
    with pytest.raises(AlignctlError, match=AFTER) as caught:
        run_stages(tmp_path, *arguments)
    assert caught.value.exit_code == 1
    assert "checkpoint-1 is the newest checkpoint" in str(caught.value)
    stage = tmp_path / METHODS[name].stage
    assert not (stage / "model").exists()
    assert not (stage / "result.json").exists()


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_model_that_is_broken_from_the_start(shared_data, tmp_path, files, name):
    with pytest.raises(AlignctlError, match="cannot be trained: .* not finite") as caught:
        run_stages(tmp_path, *stage_of(name, too_large(tmp_path / "large", shared_data), files))
    assert caught.value.exit_code == 2
    assert not (tmp_path / name / "metrics.jsonl").exists()


def test_an_evaluation_in_the_middle(shared_data, tmp_path, files):
    settings = {"learning_rate": 1e18, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    arguments = stage_of("dpo", shared_data / "models/stories260K", files, "eval.prompts=0", **settings)
    with pytest.raises(
        AlignctlError, match="`loss` of the held-out rows is not finite; training was stopped"
    ) as caught:
        run_stages(tmp_path, *arguments)
    assert "after step 1" in str(caught.value)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "dpo/metrics.jsonl").open()]
    assert rows[-1]["eval_loss"] is None


def test_a_policy_that_nothing_can_be_drawn_from(tmp_path):
    given = small_run("ppo", max_steps=2, save_strategy="no", num_ppo_epochs=1, learning_rate=1e18)
    with pytest.raises(AlignctlError, match="a logit to draw from of step 2 is not finite"):
        run_stages(tmp_path, *given)
    (batch,) = read(tmp_path / "ppo/not_finite.json")["batches"]
    assert len(batch["rows"]) == 8
