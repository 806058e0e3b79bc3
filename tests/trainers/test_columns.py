"""A row's own columns from the file to the loss, for a method that declares one and touches nothing else."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from support import per_row_beta
from support.files import metrics, outcome, read, write_rows
from support.in_process import StopsAfter, run_stages
from support.many import RUN_MANY, run_many
from support.methods import small_run

from alignctl.errors import RequestError, Stopped
from alignctl.methods.registry import methods
from alignctl.trainers.base.columns import ROW, ROW_NUMBER, WithRowColumns

pytestmark = pytest.mark.train

BETAS = [0.02 * (1 + number % 7) for number in range(36)]
NO_BETA, TOO_LONG = 5, 8


def pair(number: int, **columns: object) -> dict:
    """A pair whose prompt says which it is."""
    return {
        "prompt": [{"role": "user", "content": f"What is {number} more than {number}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * number}."}],
        "rejected": [{"role": "assistant", "content": "I do not know" + number % 5 * " at all" + "."}],
    } | columns


def with_betas(file: Path, betas: list[float]) -> Path:
    return write_rows(file, [pair(number, beta=beta) for number, beta in enumerate(betas)])


def arguments(file: Path, *more: str, method: str = "per_row_beta", **settings: object) -> tuple[str, ...]:
    return small_run(
        "ipo", f"ipo.method={method}", f"data.path={file}", "data.limit=null", "data.eval_limit=null",
        "data.eval_rows=7", "eval.judge=null", "eval.batch_size=4", *more,
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "save_strategy": "no"} | settings,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def added(monkeypatch, tmp_path):
    """The method is in the table, and knows no reference of another test."""
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(methods(), "per_row_beta", per_row_beta.METHOD)


class Watched(per_row_beta.PerRowBetaTrainer):
    """Writes down of each batch whether it is trained on, which rows its tokens are, and their losses by hand."""

    batches: list[tuple[bool, list[int], list[float]]]

    def _compute_loss(self, model, inputs, return_outputs):
        texts = self.processing_class.batch_decode(inputs["input_ids"].chunk(2)[0])
        self.numbers = [int(re.search(r"What is (\d+) more", text).group(1)) for text in texts]
        return super()._compute_loss(model, inputs, return_outputs)

    def pair_loss(self, chosen, rejected, row):
        ratios = (chosen.logps - chosen.ref_logps) - (rejected.logps - rejected.ref_logps)
        losses = [
            math.log1p(math.exp(-BETAS[number] * ratio))
            for number, ratio in zip(self.numbers, ratios.tolist(), strict=True)
        ]
        Watched.batches.append((self.model.training, self.numbers, losses))
        return super().pair_loss(chosen, rejected, row)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length", "pass_tokens": 150},
        {"precompute_ref_log_probs": "true"},
    ],
    ids=["plain", "accumulated, by length", "reference beforehand"],
)
def test_the_loss_is_that_of_each_row_s_beta(tmp_path, monkeypatch, settings):
    """One row has no beta, and one is too long."""
    watched = dataclasses.replace(per_row_beta.METHOD, trainer=f"{__name__}:Watched")
    monkeypatch.setitem(methods(), "per_row_beta", watched)
    Watched.batches = []
    rows = [pair(number, beta=beta) for number, beta in enumerate(BETAS)]
    rows[NO_BETA]["beta"] = None
    rows[TOO_LONG]["prompt"][0]["content"] += " Think." * 500
    file = write_rows(tmp_path / "rows.jsonl", rows)
    passes = settings.get("gradient_accumulation_steps", 1)
    steps = 6 // passes  # all in the first epoch, whose last step has fewer passes
    evaluated = {"max_steps": steps, "eval_strategy": "steps", "eval_steps": steps}
    run = run_stages(tmp_path / "run", *arguments(file, "data.max_lost=0.1", **settings | evaluated))

    ledger = read(run / "ipo" / "data.json")
    assert ledger["train"]["skipped"] == {str(NO_BETA + 1): "the column 'beta' is missing or empty"}
    assert ledger["train"]["lost"] + ledger["eval"]["lost"] == 1
    training = [(numbers, losses) for trained, numbers, losses in Watched.batches if trained]
    held_out = [(numbers, losses) for trained, numbers, losses in Watched.batches if not trained]
    flat, size = [loss for _, losses in training for loss in losses], 4 * passes
    of_steps = [flat[at : at + size] for at in range(0, len(flat), size)]
    expected = [sum(losses) / len(losses) for losses in of_steps]
    assert (len(training) > steps) == (passes > 1), "an accumulated step is divided, too"
    logged = metrics(run / "ipo")
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx(expected, abs=1e-5)
    assert len(expected) == steps
    assert len({round(loss, 3) for loss in expected}) > 1, "the policy leaves the reference"
    losses = [loss for _, some in held_out for loss in some]
    assert [row["eval_loss"] for row in logged if "eval_loss" in row] == pytest.approx([sum(losses) / len(losses)])
    used, held = ({number for numbers, _ in some for number in numbers} for some in (training, held_out))
    assert len(held) >= 6
    assert len(used) >= 20
    assert not used & held
    assert not {NO_BETA, TOO_LONG} & (used | held)


def test_one_beta_for_all_is_dpo_and_another_for_each_is_not(tmp_path):
    """At first policy and reference are one, so the loss is log 2 whatever beta; the gradient is not."""
    same = with_betas(tmp_path / "same.jsonl", [0.1] * len(BETAS))
    own = with_betas(tmp_path / "own.jsonl", BETAS)
    runs = {
        "dpo": arguments(same, "ipo.beta=0.1", "~ipo.normalize", method="dpo"),
        "same": arguments(same),
        "own": arguments(own),
    }
    found = {}
    for name, given in runs.items():
        run = run_stages(tmp_path / name, *given)
        found[name] = [(row["loss"], row["grad_norm"]) for row in metrics(run / "ipo") if "loss" in row]
    assert [pytest.approx(row, rel=1e-4) for row in found["dpo"]] == found["same"]
    (loss, norm), (own_loss, own_norm) = found["same"][0], found["own"][0]
    assert loss == pytest.approx(own_loss) == pytest.approx(math.log(2), abs=1e-4)
    assert own_norm != pytest.approx(norm, rel=0.05)


def test_training_continues_in_the_middle_of_an_epoch(tmp_path):
    given = arguments(with_betas(tmp_path / "rows.jsonl", BETAS), save_strategy="steps", save_steps=2)
    whole = run_stages(tmp_path / "whole", *given)
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        run_stages(tmp_path / "cut", *given, signal=StopsAfter(3))
    assert outcome(run_stages(tmp_path / "cut", *given) / "ipo") == outcome(whole / "ipo")


def test_rows_without_the_column_are_refused_by_the_method(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [pair(number) for number in range(36)])
    with pytest.raises(RequestError, match="every pair needs a `beta`"):
        run_stages(tmp_path / "run", *arguments(file))


SCRIPT = """
import runpy, sys

sys.path.insert(0, {tests!r})

from support.per_row_beta import METHOD

from alignctl.methods.registry import methods

methods()[METHOD.name] = METHOD
runpy.run_path({run_many!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_see_the_columns_of_their_rows(tmp_path):
    """With half a batch each they compute what one process does with the whole batch."""
    file = with_betas(tmp_path / "rows.jsonl", BETAS)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), run_many=str(RUN_MANY)))
    found = {}
    for processes in (1, 2):
        more = ("launcher.processes=2", "distributed=ddp") if processes == 2 else ()
        given = arguments(file, *more, per_device_train_batch_size=4 // processes)
        run_dir = tmp_path / f"run_{processes}"
        run_many(tmp_path, [{"run_dir": str(run_dir), "arguments": list(given)}], processes, script)
        found[processes] = [row["loss"] for row in metrics(run_dir / "ipo") if "loss" in row]
    assert found[2] == pytest.approx(found[1], rel=1e-4)
    assert len({round(loss, 3) for loss in found[1]}) > 1


def test_what_a_collator_does_not_know_goes_past_it():
    seen = []

    def collator(rows):
        seen.extend(rows)
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    rows = [
        {"input_ids": [number], "labels": f"text {number}", "weight": number / 3, ROW_NUMBER: number + 1, "spare": 0}
        for number in range(2)
    ]
    batch = WithRowColumns(collator, {"labels": False, "weight": True, "not there": True})(rows)
    assert seen == [{"input_ids": [0], "spare": 0}, {"input_ids": [1], "spare": 0}]
    assert list(batch) == ["input_ids", ROW, ROW_NUMBER]
    assert list(batch[ROW]) == ["labels", "weight"]
    assert batch[ROW]["labels"] == ["text 0", "text 1"]
    assert torch.equal(batch[ROW]["weight"], torch.tensor([0, 1 / 3]))
    assert batch[ROW_NUMBER].tolist() == [1, 2]
    assert list(WithRowColumns(collator, {})([{"input_ids": [0]}])) == ["input_ids"]
