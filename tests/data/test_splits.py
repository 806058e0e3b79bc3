"""Whether two splits of a data set have rows in common."""

import pytest

from alignctl.data.splits import overlap


@pytest.mark.parametrize(
    ("split", "other", "expected"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:91%]", "train[90%:]", True),
        ("train[:-10%]", "train[90%:]", False),
        ("train[:-10%]", "train[89%:]", True),
        ("train[:100]", "train[100:]", False),
        ("train[:100]", "train[99:200]", True),
        ("train[10:]", "train[5000:]", True),
        ("train[:100]", "train[90%:]", False),  # nobody knows
        ("train+validation", "validation", True),
        ("train+validation", "test", False),
        ("train[", "train", False),  # no split at all
    ],
)
def test_overlap(split, other, expected):
    assert overlap(split, other) == overlap(other, split) == expected
