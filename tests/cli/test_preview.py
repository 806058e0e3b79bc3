"""`alignctl data preview`: what it refuses before anything is read, and how rows are written without colours."""

from __future__ import annotations

import pytest

from alignctl.cli.preview import _print


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rows.jsonl",), "say what the rows are for"),
        (("rows.jsonl", "--for", "dop"), "no recipe for rows of one's own"),
        (("rows.jsonl", "--for", "dpo", "--row", "1", "--worst", "length"), "exclude each other"),
        (("rows.jsonl", "--for", "dpo", "--model", "owner/name"), "there is no such file"),
    ],
)
def test_what_does_not_go_together_is_refused(alignctl, arguments, said):
    done = alignctl("data", "preview", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_run_has_its_own_settings(alignctl, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    done = alignctl("data", "preview", "run", "--for", "dpo")
    assert done.code == 2
    assert "is a run, which has its method" in done.err


def test_marks_stand_in_for_colours(capsys):
    parts = [
        {"state": "cut", "text": "Once", "ids": [4]},
        {"state": "context", "text": " upon [b]", "ids": [5]},
        {"state": "trained", "text": " a time", "ids": [6, 7]},
    ]
    one = {"name": "chosen", "cut": 1, "context": 1, "trained": 2, "parts": parts}
    cut = {"what": "cut", "why": "longer than 3 tokens", "count": 1, "first": [{"row": 7}]}
    rows = {"source": "a.jsonl", "format": "preference", "read": 9, "kept": 7, "held_out": 2, "cut": 1}
    rows |= {"reasons": [cut]} | dict.fromkeys(("lost", "num_skipped", "ties", "partly"), 0)
    _print(
        {"rows": rows, "notices": ["told"], "refused": [{"message": "lost", "hint": "mend"}]}
        | {"shown": [{"row": 7, "sequences": [one], "margin": -0.5}]}
    )
    said = capsys.readouterr().out
    assert "row 7, chosen: 2 trained, 1 context, 1 cut; margin -0.5\n[-Once-] upon [b]{+ a time+}\n" in said
    assert "  trained: 6 7\n" in said
    assert "rows of the format `preference`: 9 read, 7 kept, 2 held out, 1 cut\nnotice: told\n" in said
    assert "a run would be refused: lost\n  hint: mend\n" in said
    assert "notice: 1 of 9 train rows cut (longer than 3 tokens): 7\n" in said
