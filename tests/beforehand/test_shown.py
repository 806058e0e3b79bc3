"""Rows are shown as the collator of the stage's trainer makes them."""

from __future__ import annotations

import pytest
from support.files import write_rows
from support.in_process import NeverStops, frozen
from support.models import TINY

from alignctl.beforehand.looking import Line
from alignctl.beforehand.shown import Asked, preview
from alignctl.data.tokenizing import cut, tokenize_completions
from alignctl.errors import RequestError

pytestmark = pytest.mark.train

FIRST = Asked(row=None, worst=None, count=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


def line(folder, recipe, name, *arguments):
    """A stage of a quickstart recipe by itself."""
    alone = (f"recipe={recipe}", f"stages=[{name}]", "data.limit=12", "data.eval_limit=4", "data.max_lost=1", *TINY)
    start = () if name == "sft" else (f"{name}.from=null",)
    return Line(frozen(folder / "run", *alone, *start, *arguments).paths, NeverStops())


def joined(sequence):
    return [token for part in sequence["parts"] for token in part["ids"]]


def test_pairs_are_cut_where_the_trainer_cuts_them(tmp_path):
    there = line(tmp_path, "sft_dpo_quickstart", "dpo", "dpo.max_length=24", "dpo.truncation_mode=keep_end")
    found = preview(there, "dpo", FIRST)
    assert [found["rows"][what] for what in ("read", "kept", "lost", "held_out", "trainer_rows")] == [12, 9, 3, 0, 9]
    ready = there.ready("dpo")
    for shown in found["shown"]:
        row = ready.rows.dataset[shown["row"] - 1]
        prompt, completions = tokenize_completions(ready.job.tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        lost = any(len(completion) >= 24 for completion in completions)  # with no prompt left on a side
        for one, completion in zip(shown["sequences"], completions, strict=True):
            assert joined(one) == prompt + completion
            if lost:
                assert one["cut"] == len(prompt + completion)
                continue
            kept = cut(prompt, completion, 24, "keep_end")
            assert (one["context"], one["trained"]) == (len(kept.prompt), len(kept.completion))
            assert one["cut"] == len(prompt + completion) - one["context"] - one["trained"]
            assert "".join(part["text"] for part in one["parts"]) == ready.job.tokenizer.decode(joined(one))
    assert any(one["cut"] for shown in found["shown"] for one in shown["sequences"])


def test_the_longest_come_first_and_one_that_is_lost_is_all_cut(tmp_path):
    there = line(tmp_path, "sft_dpo_quickstart", "dpo", "dpo.max_length=8")
    found = preview(there, "dpo", Asked(row=None, worst="length", count=12))
    (refused,) = found["refused"]
    assert "training rows (100 %) are lost: with `dpo.max_length=8`" in refused["message"]
    lengths = [sum(len(joined(one)) for one in shown["sequences"]) for shown in found["shown"]]
    assert len(lengths) == 12
    assert all(one["cut"] == len(joined(one)) for one in found["shown"][0]["sequences"])
    longest = preview(there, "dpo", Asked(row=found["shown"][0]["row"], worst=None, count=1))
    assert longest["shown"] == found["shown"][:1]


@pytest.mark.parametrize(
    ("recipe", "name", "sequences", "trained"),
    [("sft_quickstart", "sft", ["row"], True), ("rlhf_quickstart", "rm", ["chosen", "rejected"], 1)],
)
def test_what_is_trained_on_by_other_methods(tmp_path, recipe, name, sequences, trained):
    (shown, _) = preview(line(tmp_path, recipe, name), name, FIRST)["shown"]
    assert [one["name"] for one in shown["sequences"]] == sequences
    for one in shown["sequences"]:
        assert one["cut"] == 0
        assert one["trained"] == trained if trained is not True else one["trained"] > 1
        assert one["context"] > 1


def test_the_least_margin_comes_first_and_counts_are_those_of_the_ledger(tmp_path):
    """Of a file of which rows are held out and one is skipped; what the model that stands in is said of is not told."""
    margins = [0.5, -2.0, 3.0, -1.0, 1.0, 2.0]
    rows = [{"prompt": f"{i}?", "chosen": "a b", "rejected": "c", "margin": m} for i, m in enumerate(margins)]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "6?"}])
    there = line(tmp_path, "rlhf_quickstart", "rm", f"data.path={file}", "data.eval_rows=1", "eval.judge=null")
    found = preview(there, "rm", Asked(row=None, worst="margin", count=2))
    assert found["refused"] == []
    held = there.ready("rm").held_rows.numbers
    left = sorted((m, i) for i, m in enumerate(margins, 1) if i not in held)
    assert [(shown["margin"], shown["row"]) for shown in found["shown"]] == left[:2]
    assert [found["rows"][what] for what in ("read", "kept", "held_out", "num_skipped")] == [7, 5, 1, 1]
    assert not any("engine" in said for said in found["notices"])


def test_rows_that_cannot_be_shown_are_told(tmp_path):
    there = line(tmp_path, "sft_dpo_quickstart", "dpo")
    with pytest.raises(RequestError, match="there is no row 13"):
        preview(there, "dpo", Asked(row=13, worst=None, count=1))
    with pytest.raises(RequestError, match="have no margins for `dpo`"):
        preview(there, "dpo", Asked(row=None, worst="margin", count=1))
