"""What a mixture takes of each source: numbers worked out by hand."""

import numpy as np
import pytest

from alignctl.data.mixing import mixture


def shares(taken, sizes):
    """Rows of each source, and the share of each in the sum of sizes."""
    ends = np.cumsum([len(own) for own in sizes])
    source = np.searchsorted(ends, taken, side="right")
    counts = np.concatenate(sizes)[taken]
    return [int((source == i).sum()) for i in range(len(sizes))], [
        float(counts[source == i].sum() / counts.sum()) for i in range(len(sizes))
    ]


ONES = [np.ones(100, np.int64), np.ones(30, np.int64)]


@pytest.mark.parametrize(
    ("weights", "stopping", "expected"),
    [
        ((0.7, 0.3), "first_exhausted", [70, 30]),  # the second runs out
        ((9, 1), "first_exhausted", [100, 11]),  # the first does
        ((0.7, 0.3), "all_exhausted", [100, 43]),
        ((0.5, 0.5), "all_exhausted", [100, 100]),
        (None, "first_exhausted", [100, 30]),
    ],
)
def test_rows(weights, stopping, expected):
    taken = mixture(ONES, weights, stopping, seed=1)
    assert shares(taken, ONES)[0] == expected
    times = np.bincount(taken, minlength=130)
    assert times[:100].max() - times[:100].min() <= 1, "no row comes again before all others of its source"
    assert times[100:].max() - times[100:].min() <= 1
    if stopping == "first_exhausted":
        assert times.max() == 1


def test_the_order_is_of_the_seed_alone_and_mixes():
    one, again, other = (mixture(ONES, (0.7, 0.3), "first_exhausted", seed) for seed in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    assert 10 < (one[:50] >= 100).sum() < 20, "half of the way, half of the second source"


def test_tokens():
    """Rows of the second source are ten times as long."""
    sizes = [np.full(1000, 10), np.full(100, 100)]
    rows, of_tokens = shares(mixture(sizes, (0.5, 0.5), "first_exhausted", 0), sizes)
    assert rows == [1000, 100]
    assert of_tokens == [0.5, 0.5]
    rows, of_tokens = shares(mixture(sizes, (0.75, 0.25), "first_exhausted", 0), sizes)
    assert rows == [1000, 33]
    assert of_tokens[0] == pytest.approx(0.75, abs=0.01)


def test_a_limit_keeps_the_shares():
    taken = mixture(ONES, (0.7, 0.3), "first_exhausted", seed=1, limit=50)
    assert shares(taken, ONES)[0] == [35, 15]
    sizes = [np.full(1000, 10), np.full(100, 100)]
    rows, of_tokens = shares(mixture(sizes, (0.7, 0.3), "first_exhausted", 0, limit=500), sizes)
    assert sum(rows) == pytest.approx(500, abs=1)
    assert of_tokens[0] == pytest.approx(0.7, abs=0.01)


def test_what_is_made_of_one_row_stays_together():
    starts = [np.tile([True, False, False, False], 25), np.ones(30, bool)]
    taken = mixture(ONES, (0.5, 0.5), "all_exhausted", seed=1, starts=starts)
    first = [position for position, row in enumerate(taken) if row < 100 and row % 4 == 0]
    assert len(first) == 25
    assert all(taken[at : at + 4].tolist() == list(range(taken[at], taken[at] + 4)) for at in first)


def test_a_small_share_is_one_row_at_least():
    taken = mixture(ONES, (1000, 1), "first_exhausted", seed=1)
    assert shares(taken, ONES)[0] == [100, 1]
