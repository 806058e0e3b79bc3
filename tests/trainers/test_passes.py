"""However an optimizer step is divided into passes, loss, gradient and metrics are those of all its rows together."""

from __future__ import annotations

import pytest
import torch

from alignctl.config.trl_fields import config_fields
from alignctl.engine.layout import balanced
from alignctl.methods.registry import methods
from alignctl.trainers.base import passes
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.passes import rows_of, together

pytestmark = pytest.mark.train

# Settings under which a loss has several parts, or rows are laid out otherwise.
CASES = {
    "sft": {},
    "sft, packed": {"packing": True, "max_length": 64},
    "reward": {"center_rewards_coefficient": 0.1},
    "dpo": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 0.2]},
    "dpo, weighed": {"use_weighting": True},
    "dpo, padded": {"engine": "padded"},
    "dpo, by length": {"train_sampling_strategy": "group_by_length"},
    "ipo": {},
    "orpo": {},
    "simpo": {"sft_weight": 0.5},
    "kto": {"desirable_weight": 1.3},
    "kto, no estimate": {"loss_type": "apo_zero_unpaired"},
}


def logged(small, case: str, tokens: int, batch: int, steps: int, epochs: int = 1) -> list[dict[str, float]]:
    """What training on 20 rows logs of every step, times and rates left out."""
    name = case.partition(",")[0]
    trainer = small.trainer(
        name, rows=small.rows(methods()[name].data_kind, 20), pass_tokens=tokens, per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps, num_train_epochs=epochs, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", **CASES[case],
    )  # fmt: skip
    trainer.train()
    return [
        {key: value for key, value in row.items() if key not in ("epoch", "learning_rate")}
        for row in trainer.state.log_history
        if "loss" in row
    ]


LOSSES = config_fields("trl.trainer.dpo_config:DPOConfig")["loss_type"].choices or ()
MIXED = ("aot", "aot_unpaired")


@pytest.mark.night
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in MIXED])
def test_division_changes_no_loss_of_dpo(small, monkeypatch, loss):
    assert len(LOSSES) > 10
    settings = {"loss_type": [loss]} | ({"label_smoothing": 0.01} if loss == "exo_pair" else {})
    monkeypatch.setitem(CASES, "dpo, one", settings)
    expected = logged(small, "dpo, one", 100_000, 8, 1)
    # AdamW makes more of a rounding of small gradients.
    assert logged(small, "dpo, one", 90, 2, 4) == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected]


def count_passes(monkeypatch) -> list[int]:
    """Grows with each pass that is put together."""
    counted: list[int] = []

    def counting(rows):
        counted.append(len(rows))
        return together(rows)

    monkeypatch.setattr(passes, "together", counting)
    return counted


@pytest.mark.parametrize("case", CASES)
def test_division_changes_nothing(small, monkeypatch, case):
    """20 rows in steps of 8: the last step has fewer. Rewards are differences of sums, so an absolute error of float32
    counts."""
    expected = logged(small, case, 100_000, 8, 1)
    assert len(expected) in (2, 3, 5)  # packed rows are fewer, and feedback is twice as many
    made = count_passes(monkeypatch)
    for division in ((90, 8, 1), (90, 2, 4), (100_000, 4, 2)):
        assert logged(small, case, *division) == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in expected]
        assert (len(made) > len(expected)) == (division[0] < 100_000)
        made.clear()


@pytest.mark.parametrize("case", ["sft", "dpo", "orpo", "reward"])
def test_division_changes_nothing_after_many_steps(small, case):
    """AdamW divides by the size of gradients, so a rounding of theirs counts at every step."""
    expected = logged(small, case, 100_000, 8, 1, epochs=7)
    assert len(expected) == 21
    assert logged(small, case, 90, 2, 4, epochs=7) == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in expected]


def test_what_mixes_the_rows_of_a_batch_keeps_it(small):
    mixes = methods()["dpo"].mixes_rows
    assert mixes is not None
    assert mixes({"loss_type": ["sigmoid", "sft"], "use_weighting": False}) is None
    reason = mixes({"loss_type": ["aot"], "use_weighting": False})
    assert "sorts the pairs" in reason
    trainer = small.trainer("dpo", keeps_batches=reason)
    assert trainer.notices[-1] == f"passes: a batch each, because {reason}"


def test_passes_are_not_smaller_than_the_longest_row(small):
    trainer = small.trainer("sft", pass_tokens=8)
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    said = f"passes: at most {longest} tokens each (not 8: the longest row has more), however a step's rows are batched"
    assert trainer.notices[-1] == said


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
