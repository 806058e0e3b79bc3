"""Which processes may continue from whose checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignctl.errors import RequestError
from alignctl.run.checkpoints import Checkpoint
from alignctl.run.shares import kind_of, must_convert

FSDP = "fsdp"


def asked(then: tuple[int, int | str], now: tuple[int, int | str]) -> bool:
    """Each is (processes, ZeRO stage or FSDP)."""
    kinds = [kind_of(processes, 0 if how == FSDP else how, how == FSDP) for processes, how in (then, now)]
    return must_convert(Checkpoint(Path("checkpoint-5"), 5, kinds[0]), kinds[1])


@pytest.mark.parametrize(
    ("then", "now"), [((1, 0), (4, 0)), ((2, 2), (2, 2)), ((8, 3), (8, 3)), ((2, FSDP), (4, FSDP))]
)
def test_what_is_shared_alike_or_not_at_all_is_taken_as_it_is(then, now):
    assert not asked(then, now)


@pytest.mark.parametrize(("then", "now"), [((2, 2), (4, 2)), ((2, 1), (2, 2)), ((8, 2), (1, 1)), ((2, 3), (1, 3))])
def test_shares_of_one_kind_are_converted(then, now):
    assert asked(then, now)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ((2, 2), (1, 0), "`distributed=zero1` or `distributed=zero2`, with any number of processes"),
        ((2, 2), (2, 3), "`distributed=zero1` or `distributed=zero2`"),
        ((2, 3), (2, 1), "give `distributed=zero3`, "),
        ((2, 0), (2, 2), "give `distributed=ddp`, "),
        ((2, FSDP), (2, 3), "give `distributed=fsdp2`, with any number of processes"),
        ((2, FSDP), (2, 0), "give `distributed=fsdp2`, "),
        ((2, 3), (2, FSDP), "give `distributed=zero3`, "),
        ((2, 0), (2, FSDP), "give `distributed=ddp`, "),
    ],
)
def test_others_are_refused_and_told_what_would_do(then, now, words):
    with pytest.raises(RequestError, match="checkpoint-5 was written by 2 processes.* cannot be continued") as refused:
        asked(then, now)
    assert words in refused.value.problems[0].hint
