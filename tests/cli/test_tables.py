"""The summary of a run says what became of rows, why, and where they stand."""

from alignctl.cli.tables import print_summary


def reason(what, why, rows, count=None):
    first = [{"row": row, "file": "rows.csv", "line": line} for row, line in rows]
    return {"what": what, "why": why, "count": count or len(first), "first": first}


def test_rows_that_are_not_trained_on_as_they_are(capsys):
    reasons = [
        reason("skipped", "the rejected completion is empty", [(3, 4), (7, 7)]),
        reason("lost", "nothing of a completion is left", [(n, n) for n in range(8, 28)], count=120),
        reason("ties", "no completion is better than another", [(5, 5)]),
        *(reason("cut", f"reason {number}", [(40, 40)]) for number in range(7)),
    ]
    rows = {"source": "rows.csv", "read": 600, "reasons": reasons}
    parts = {"train": rows, "eval": {"source": "other.csv", "read": 5, "reasons": reasons[:1]}}
    print_summary({"recipe": "r", "run_dir": "run", "stages": {"dpo": {"rows": parts, "after": {}}}})
    said = capsys.readouterr().out.splitlines()
    assert "dpo: 2 of 600 train rows skipped (the rejected completion is empty): 3 (line 4), 7" in said
    assert "dpo: 1 of 600 train rows tied (no completion is better than another): 5" in said
    lost = "dpo: 120 of 600 train rows lost (nothing of a completion is left): 8, 9, 10, 11, 12, 13, 14, 15, 16, 17"
    assert f"{lost} and others, see data.json" in said
    assert "dpo: train rows cut for 2 more reasons, see data.json" in said
    assert sum(" rows cut (" in line for line in said) == 5
    where = "3 (rows.csv, line 4), 7 (rows.csv)"
    assert f"dpo: 2 of 5 eval rows skipped (the rejected completion is empty): {where}" in said
