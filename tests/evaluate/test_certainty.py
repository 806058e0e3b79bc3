"""How sure measured numbers are, against published numbers and tables."""

import pytest

from alignctl.evaluate.certainty import Certainty, certainty, of_sums, of_wins, wilson, within_noise


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    ids=str,
)
def test_wilson_on_published_numbers(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("more", "less", "noise"),
    [(0, 0, True), (5, 0, True), (6, 0, False), (7, 1, True), (8, 1, False), (900, 800, False)],
)
def test_shares_are_compared_row_by_row(more, less, noise):
    """Two-sided chances of a coin: 5 of 5 are 0.0625, 6 of 6 0.031, 7 of 8 0.070, 8 of 9 0.039."""
    before, after = [0.0] * more + [1.0] * less + [1.0] * 50, [1.0] * more + [0.0] * less + [1.0] * 50
    assert within_noise(before, after) == noise


@pytest.mark.parametrize(("n", "quantile"), [(4, 3.182), (11, 2.228), (31, 2.042)])
def test_other_numbers_are_compared_by_students_t(n, quantile):
    """Of changes whose mean is just below and just above the quantile of a printed table, in standard errors."""
    spread = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
    error = (sum(x * x for x in spread) / (n - 1) / n) ** 0.5
    for factor, noise in ((0.98, True), (1.02, False)):
        after = [x + factor * quantile * error for x in spread]
        assert within_noise([0.0] * n, after) == noise


def test_one_number_of_all_rows_and_numbers_of_other_rows_are_not_compared():
    found = certainty({"a": [1.0, 0.0]}, {"a": [1.0], "kl": [0.5, 2.0]}, {"loss": 7})
    assert found["loss"] == Certainty(7, None, None, None)
    assert found["a"].within_noise is None
    assert found["kl"] == Certainty(2, None, None, None)


def test_sums_over_batches_are_compared_batch_by_batch():
    """Student's t of five changes of -0.1 with little spread, and of five around 0; four batches are too few."""
    before = {"loss": [0.5, 0.4, 0.3, 0.4, 0.2], "maths_loss": [0.2] * 5, "chat_loss": [0.3] * 4}
    after = {"loss": [0.4, 0.3, 0.21, 0.29, 0.1], "maths_loss": [0.3, 0.1, 0.2, 0.25, 0.16], "chat_loss": [0.1] * 4}
    found = of_sums(before, after, {"loss": 150, "maths_loss": 90, "chat_loss": 60})
    assert found == {"loss": Certainty(150, None, None, False), "maths_loss": Certainty(90, None, None, True)}


def test_a_win_rate_says_nothing_where_half_may_be_true():
    assert of_wins(0.55, 100).within_noise
    assert not of_wins(0.65, 100).within_noise
