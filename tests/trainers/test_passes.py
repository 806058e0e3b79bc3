"""However an optimizer step is divided into passes, loss, gradient and metrics are those of all its rows together."""

from __future__ import annotations

import pytest
import torch
from support.files import metrics
from support.in_process import run_stages
from support.methods import METHODS, small_run

from alignctl.engine.layout import balanced
from alignctl.errors import RequestError
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.passes import rows_of, together

pytestmark = pytest.mark.train

# Settings under which a loss has several parts, or the batches of a step are uneven.
CASES = {
    "sft": (),
    "sft, packed": ("sft.packing=true", "sft.max_length=64"),
    "reward": ("reward.center_rewards_coefficient=0.1",),
    "dpo": ("dpo.loss_type=[sigmoid,sft,ipo]", "dpo.loss_weights=[1.0,0.5,0.2]"),
    "dpo, weighed": ("dpo.loss_type=[sigmoid]", "dpo.loss_weights=null", "dpo.use_weighting=true"),
    "dpo, padded": ("dpo.engine=padded",),
    "ipo": (),
    "orpo": (),
    "simpo": ("simpo.sft_weight=0.5",),
    "kto": ("kto.loss_type=apo_zero_unpaired",),
}


def logged(folder, case, tokens, batch, steps) -> list[dict[str, float]]:
    name = case.partition(",")[0]
    stage = METHODS[name].stage
    settings = [setting.replace(f"{name}.", f"{stage}.", 1) for setting in CASES[case]]
    run = run_stages(
        folder,
        *small_run(
            name, *settings, rows=20, num_train_epochs=1, pass_tokens=tokens, per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps, save_strategy="no", learning_rate=1e-3,
        ),
    )  # fmt: skip
    rows = [row for row in metrics(run / stage) if "loss" in row]
    return [{key: value for key, value in row.items() if key != "epoch"} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_division_changes_nothing(tmp_path, case):
    """20 rows in steps of 8: the last step has fewer. Rewards are differences of sums, so an absolute error of float32
    counts."""
    expected = logged(tmp_path / "whole", case, 100_000, 8, 1)
    assert len(expected) in (2, 3, 5)  # packed rows are fewer, and feedback is twice as many
    for number, division in enumerate(((90, 8, 1), (90, 2, 4), (100_000, 4, 2))):
        found = logged(tmp_path / str(number), case, *division)
        if "packed" in case and division[2] > 1:
            continue  # packs of other rows
        assert found == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected]


def test_what_mixes_the_rows_of_a_batch_keeps_it(small):
    from alignctl.methods.registry import methods

    mixes = methods()["dpo"].mixes_rows
    assert mixes is not None
    assert mixes({"loss_type": ["sigmoid", "sft"], "use_weighting": False}) is None
    reason = mixes({"loss_type": ["aot"], "use_weighting": False})
    assert "sorts the pairs" in reason
    trainer = small.trainer("dpo", keeps_batches=reason)
    assert trainer.notices[-1] == f"passes: a batch each, because {reason}"
    with pytest.raises(RequestError, match="`pass_tokens` would have no effect"):
        small.trainer("dpo", keeps_batches=reason, pass_tokens=64)


def test_a_row_that_is_longer_than_a_pass_is_said(small):
    said = small.trainer("sft", pass_tokens=8).notices[-1]
    assert "the longest row has" in said
    assert "pass to itself" in said


def test_few_passes_evenly_filled():
    parts = balanced([50, 10, 10, 10, 40, 30], 60, padded=False)
    assert sorted(index for part in parts for index in part) == list(range(6))
    assert len(parts) == 3
    assert max(sum([50, 10, 10, 10, 40, 30][index] for index in part) for part in parts) <= 60
    assert balanced([100, 5], 60, padded=False) == [[0], [1]]


def test_rows_come_together_as_they_were():
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0], [4, 5, 6, 7], [4, 0, 0, 0]])
    batch = {
        "input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100),
        "ref_chosen_logps": torch.tensor([0.5, 0.25]), ROW: {"margin": torch.tensor([1.0, 2.0]), "name": ["a", "b"]},
    }  # fmt: skip
    first, second = rows_of(batch, blocks=2)
    again = together([second, first])
    assert again["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 0], [4, 0, 0, 0], [4, 5, 6, 7]]
    assert again["labels"][0].tolist() == [1, 2, -100, -100]
    assert again["ref_chosen_logps"].tolist() == [0.25, 0.5]
    assert again[ROW]["name"] == ["b", "a"]
    assert together([second])["input_ids"].tolist() == [[1, 2], [4, 0]], "no longer than they are"
