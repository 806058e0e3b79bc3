"""What a limit makes of rows, by hand."""

import pytest

from alignctl.data.lengths import NEVER, RowLengths, limit_for
from alignctl.data.token_columns import AnswerIds, LabelledIds, PairIds, PromptIds, ScoredIds

PROMPT, SHORT, LONG = [1, 2, 3], [4], [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("columns", "row", "needed"),
    [
        (PairIds(4, "keep_start"), (PROMPT, LONG, SHORT), (4, 8)),  # one token after the prompt
        (PairIds(4, "keep_end"), (PROMPT, LONG, SHORT), (6, 8)),  # one token before the longer completion
        (PairIds(4, "keep_end"), ([], LONG, SHORT), (1, 5)),  # there is no prompt to be lost
        (AnswerIds(4), (PROMPT, LONG), (4, 8)),
        (ScoredIds(4), (PROMPT, LONG), (5, 5)),  # nothing is cut
        (PromptIds(4), (PROMPT,), (3, 3)),
        (PromptIds(4), ([],), (NEVER, 0)),
        (LabelledIds(4, "keep_start", True, packed=False), ([*PROMPT, *LONG], [-100] * 3 + LONG), (4, 8)),
        (LabelledIds(4, "keep_end", True, packed=False), ([*PROMPT, *LONG], [-100] * 3 + LONG), (6, 8)),
        (LabelledIds(4, "keep_end", False, packed=False), (LONG, LONG), (1, 5)),  # any part of a text will do
        # Of two turns the second alone, with a token before it.
        (LabelledIds(4, "keep_end", True, packed=False), (LONG, [-100, 5, -100, 7, 8]), (3, 5)),
        (LabelledIds(4, "keep_start", True, packed=False), (LONG, [-100, 5, -100, 7, 8]), (2, 5)),
        (LabelledIds(4, "keep_start", True, packed=False), (SHORT, [-100]), (NEVER, 1)),
    ],
)
def test_what_a_row_needs(columns, row, needed):
    assert columns.needed(row) == needed


def test_a_row_is_kept_cut_or_lost_and_nothing_twice():
    lengths = RowLengths.of(8, [(4, 8), (4, 9), (9, 20), (NEVER, 3), (1, 1)], "too long")
    assert lengths.lost.tolist() == [False, False, True, True, False]
    assert lengths.cut.tolist() == [False, True, False, False, False]
    assert [lengths.why(2), lengths.why(3)] == ["too long", "nothing of it is trained on"]
    anything = RowLengths.of(None, [(9, 20), (NEVER, 3)], "too long")
    assert (anything.lost.tolist(), anything.cut.tolist()) == ([False, True], [False, False])


def test_percentiles_are_lengths_that_rows_have():
    lengths = RowLengths.of(None, [(1, length) for length in range(1, 101)], "")
    assert lengths.percentiles() == {"50 %": 51, "90 %": 91, "99 %": 100, "max": 100}
    assert lengths.described() == (
        "50 % of the rows have up to 51, 90 % up to 91, 99 % up to 100, the longest has 100 tokens"
    )


@pytest.mark.parametrize(("share", "expected"), [(0, 100), (0.01, 99), (0.05, 95), (0.055, 95), (0.99, 1), (1, 1)])
def test_a_limit_that_would_do_and_the_one_below_would_not(share, expected):
    needed = RowLengths.of(None, [(n, n) for n in range(1, 101)], "").least
    assert limit_for(needed, share) == expected
    if expected > 1:
        assert (needed > expected).sum() <= share * 100 < (needed > expected - 1).sum()


def test_no_limit_would_do():
    assert limit_for(RowLengths.of(None, [(NEVER, 1), (3, 3)], "").least, 0.4) is None
