"""KTO's class weights, its order of rows, and what it refuses."""

from __future__ import annotations

import pytest

from alignctl.errors import RequestError
from alignctl.trainers.preference.kto import balanced_weights, describe_weights

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("desirable", "undesirable", "given", "expected"),
    [
        (100, 100, (None, None), (1.0, 1.0)),
        (300, 100, (None, None), (1.0, 3.0)),
        (50, 200, (None, None), (4.0, 1.0)),
        (300, 100, (0.5, None), (0.5, 1.0)),
        (300, 100, (None, 2.5), (1.0, 2.5)),
    ],
)
def test_weights(desirable, undesirable, given, expected):
    weights = balanced_weights(desirable, undesirable, *given)
    assert weights == expected
    if given == (None, None):  # both classes weigh the same, the lower bound of the paper's Eq. 8
        assert weights[0] * desirable == weights[1] * undesirable


@pytest.mark.parametrize(
    ("weights", "warned"),
    [((1.0, 3.0), False), ((1.33, 3.0), False), ((1.0, 1.0), True), ((1.0, 4.0), True), ((4 / 3, 3.0), False)],
)
def test_a_word_outside_the_band_of_the_paper(weights, warned):
    text = describe_weights(300, 100, weights, computed=False)
    assert ("the KTO paper recommends" in text) == warned
    assert "300 wanted and 100 unwanted" in text


def test_labels_of_one_kind_are_refused(small):
    rows = small.rows("feedback")
    for label in (True, False):
        with pytest.raises(RequestError, match=f"all rows that can be used have `label` {str(label).lower()}"):
            small.trainer("kto", rows=rows.filter(lambda row, label=label: row["label"] == label))


def test_sorted_rows_are_mixed(small):
    """TRL reads batches in order: sorted by label, each would hold one class."""
    rows = small.rows("feedback", 32)
    trainer = small.trainer("kto", rows=rows.sort("label"), per_device_train_batch_size=16)
    labels = [sum(batch["label"]) for batch in trainer.get_train_dataloader()]
    assert all(4 <= wanted <= 12 for wanted in labels)
    again = small.trainer("kto", rows=rows.sort("label"), per_device_train_batch_size=16)
    assert again.train_dataset["completion_ids"][:] == trainer.train_dataset["completion_ids"][:]


def test_the_weights_reach_the_loss(small):
    rows = small.rows("feedback").select([0, 2, 4, 5])  # three wanted, one not
    trainer = small.trainer("kto", rows=rows)
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (1.0, 3.0)
    assert "computed" in trainer.notices[-1]


def test_a_batch_may_be_of_one_row_where_a_step_has_more(small):
    def loss(**batches):
        trainer = small.trainer("kto", max_steps=1, logging_steps=1, save_strategy="no", **batches)
        trainer.train()
        return next(row["loss"] for row in trainer.state.log_history if "loss" in row)

    alone = loss(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert alone == pytest.approx(loss(per_device_train_batch_size=4), rel=1e-6)
    with pytest.raises(RequestError, match="the other rows of an optimizer step, and it has 1"):
        small.trainer("kto", per_device_train_batch_size=1)
