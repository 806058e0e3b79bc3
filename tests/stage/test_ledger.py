"""What became of rows is counted once, told with its place and its reason, and refused where it is too much."""

import json
from dataclasses import replace

import pytest

from alignctl.config.compose import compose, read_request
from alignctl.config.stages import stage_config
from alignctl.data.lengths import RowLengths
from alignctl.data.reading import read_split
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError
from alignctl.stage.ledger import ledger
from alignctl.stage.lengths import check_lengths, said_of_cut

pytestmark = pytest.mark.train  # the datasets library takes seconds to import


def read(file, rows, **settings):
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    data = DataSettings(path=str(file), eval_rows=0, **settings)
    return read_split(data, "preferences", seed=0)[0]


def stage(**data):
    config, problems = compose(read_request(["recipe=dpo_local", "model.path=m", "data.path=d.jsonl"]))
    assert problems == []
    given = stage_config(config, "dpo")
    return replace(given, data=replace(given.data, **data))


def pair(number, **columns):
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad"} | columns


def test_every_row_is_kept_or_lost_or_skipped(tmp_path):
    rows = read(tmp_path / "rows.jsonl", [pair(0), pair(1, chosen=""), *map(pair, range(2, 6))])
    lengths = RowLengths.of(8, [(3, 8), (9, 10), (3, 12), (9, 9), (3, 4)], "nothing of a completion is left")
    found = ledger(rows, lengths)
    counts = {name: found[name] for name in ("read", "kept", "lost", "num_skipped", "held_out", "cut", "partly")}
    assert counts == {"read": 6, "kept": 3, "lost": 2, "num_skipped": 1, "held_out": 0, "cut": 1, "partly": 0}
    assert found["skipped"] == {2: "the chosen completion is empty"}
    assert found["lengths"] == {"limit": 8, "50 %": 9, "90 %": 12, "99 %": 12, "max": 12}
    file = str(tmp_path / "rows.jsonl")
    assert [(one["what"], one["why"], one["count"], one["first"][0]) for one in found["reasons"]] == [
        ("skipped", "the chosen completion is empty", 1, {"row": 2, "file": file, "line": 3}),
        ("lost", "nothing of a completion is left", 2, {"row": 3, "file": file, "line": 5}),
        ("cut", "longer than 8 tokens", 1, {"row": 4, "file": file, "line": 7}),
    ]
    nothing_made = ledger(rows, None)
    assert (nothing_made["kept"], nothing_made["lost"], nothing_made["lengths"]) == (5, 0, None)


def test_a_row_of_which_some_pairs_are_lost_counts_once(tmp_path):
    scored = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [3, 2, 1]}
    rows = read(tmp_path / "rows.jsonl", [scored, scored | {"prompt": "q"}])
    lengths = RowLengths.of(8, [(9, 9), (1, 9), (1, 1), (9, 9), (9, 9), (9, 9)], "lost")
    found = ledger(rows, lengths)
    assert [found[name] for name in ("read", "kept", "lost", "partly", "cut", "trainer_rows")] == [2, 1, 1, 1, 1, 2]


def test_ties_are_counted_by_themselves(tmp_path):
    votes = ([1, 1, 2], [1, 2], [2, 2])
    rows = [
        {"prompt": f"p{i}", "response_a": "a", "response_b": f"b{i}", "votes": each} for i, each in enumerate(votes)
    ]
    found = ledger(read(tmp_path / "rows.jsonl", [*rows, rows[0] | {"response_b": ""}]), None)
    assert [found[name] for name in ("read", "kept", "ties", "num_skipped")] == [4, 2, 1, 1]
    assert found["agreement"] == pytest.approx((1 / 3 + 0 + 1 + 1 / 3) / 4)
    tied = next(one for one in found["reasons"] if one["what"] == "ties")
    assert tied["why"] == "no completion is better than another"
    assert tied["first"] == [{"row": 2, "file": str(tmp_path / "rows.jsonl"), "line": 3}]


def test_the_record_of_many_rows_is_short(tmp_path):
    bad = [pair(i, chosen="") for i in range(250)] + [pair(i, margin=f"m{i}") for i in range(150)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [pair(0, margin=1), *bad]))
    from alignctl.methods.registry import methods

    data = DataSettings(path=str(file), eval_rows=0)
    rows, _ = read_split(data, "preferences", seed=0, columns=methods()["reward"].row_columns)
    found = ledger(rows, None)
    assert found["num_skipped"] == 400
    assert [one["count"] for one in found["reasons"]] == [250, *[1] * 98, 52]
    assert found["reasons"][-1]["why"] == "52 other reasons"
    assert [len(one["first"]) for one in found["reasons"]] == [100, *[1] * 98, 52]
    assert len(found["skipped"]) == 250


LONG = RowLengths.of(100, [(50, 90)] * 90 + [(50, 150)] * 4 + [(300, 310)] * 6, "nothing of a completion is left")


def test_too_many_lost_rows_are_refused_with_what_would_do():
    with pytest.raises(RequestError) as refused:
        check_lengths(LONG, stage(), "max_length", seen=None)
    [problem] = refused.value.problems
    assert problem.message == (
        "6 of 100 training rows (6 %) are lost: with `dpo.max_length=100` nothing of a completion is left, and "
        "`data.max_lost=0.05` is the most allowed; 50 % of the rows have up to 90, 90 % up to 150, 99 % up to 310, the "
        "longest has 310 tokens"
    )
    assert problem.hint.startswith("set `dpo.max_length=300`, or take long rows out; `data.max_lost=0.06` accepts it")
    check_lengths(LONG, stage(max_lost=0.06), "max_length", seen=None)
    with pytest.raises(RequestError) as refused:
        check_lengths(LONG, stage(), "max_length", seen=200)
    assert "the model can see only 200 tokens" in refused.value.problems[0].hint


def test_cut_rows_are_told_and_refused_where_that_is_asked_for():
    accepted = stage(max_lost=0.1)
    check_lengths(LONG, accepted, "max_length", seen=None)
    assert said_of_cut(LONG, accepted, "max_length", None) == (
        f"4 of 100 training rows (4 %) are cut to `dpo.max_length=100`; {LONG.described()}. "
        "To cut at most 1 %, set `dpo.max_length=310`"
    )
    with pytest.raises(RequestError, match=r"4 of 100 training rows \(4 %\) are cut") as refused:
        check_lengths(LONG, stage(max_lost=0.1, max_truncated=0.03), "max_length", seen=None)
    assert "`data.max_truncated=0.04` accepts it" in refused.value.problems[0].hint
    check_lengths(LONG, stage(max_lost=0.1, max_truncated=0.04), "max_length", seen=None)
    assert said_of_cut(RowLengths.of(None, [(1, 9)], ""), accepted, "max_length", None) is None
