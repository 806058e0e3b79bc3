"""The summary of a run: what each stage measured, and what became of rows, why, and where they stand."""

import re

from alignctl.cli.summary import METRICS, print_comparison, print_summary


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
    print_summary({"recipe": "r", "run_dir": "run", "stages": {"dpo": {"rows": parts, "after": {}, "advice": []}}})
    said = capsys.readouterr().out.splitlines()
    assert "dpo: 2 of 600 train rows skipped (the rejected completion is empty): 3 (line 4), 7" in said
    assert "dpo: 1 of 600 train rows tied (no completion is better than another): 5" in said
    lost = "dpo: 120 of 600 train rows lost (nothing of a completion is left): 8, 9, 10, 11, 12, 13, 14, 15, 16, 17"
    assert f"{lost} and others, see data.json" in said
    assert "dpo: train rows cut for 2 more reasons, see data.json" in said
    assert sum(" rows cut (" in line for line in said) == 5
    where = "3 (rows.csv, line 4), 7 (rows.csv)"
    assert f"dpo: 2 of 5 eval rows skipped (the rejected completion is empty): {where}" in said


def test_every_stage_has_its_table_in_80_columns(capsys):
    share = {"n": 12_345, "before": [0.99, 1.0], "after": [0.99, 1.0], "within_noise": True}
    before = {"preference_accuracy_per_token": 1.0, "kl": 0.0, "rewards/reward_model": -1.234, "label_auc": 0.5}
    after = {"preference_accuracy_per_token": 0.999, "kl": 12.5, "rewards/reward_model": 2.0, "label_auc": 0.75}
    spread = {"rewards/reward_model_std": 10.25}
    sure = {"preference_accuracy_per_token": share, "kl": share | {"within_noise": False}, "win_rate": share}
    dpo = {"rows": {}, "before": before | spread, "after": after | spread, "certainty": sure, "win_rate": 0.5}
    sft = {"rows": {}, "after": {"loss": 1.25, "maths_loss": 1.5}, "certainty": {"loss": {"n": 40}}, "advice": []}
    stages = {"sft": sft, "dpo": dpo | {"advice": ["try `dpo.beta=1`"]}, "ppo": {"rows": {}, "advice": []}}
    print_summary({"recipe": "r", "run_dir": "run", "stages": stages})
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 80
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in said if "│" in line
    }
    assert cells["held-out loss"] == ["1.250", "40"]
    assert cells["held-out loss, maths"] == ["1.500", ""]
    assert cells["the same per token"] == ["100.0% (99-100)", "99.9% (99-100)", "12345", "noise"]
    assert cells["KL to reference (nats)"] == ["0.000", "12.500", "12345", "+12.5"]
    assert cells["labels told apart (AUC)"] == ["50.0%", "75.0%", "", "+25.0"]
    assert cells["score, reward_model"] == ["-1.23 ± 10", "2 ± 10", "", "+3.23"]
    assert cells["win rate against before"] == ["", "50.0% (99-100)", "12345", "noise"]
    assert said.index("r: stage sft, on held-out data") < said.index("r: stage dpo, on held-out data")
    assert said[-1] == "advice for dpo: try `dpo.beta=1`"


def test_points_of_a_sweep_are_compared_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    measured = {metric.key: 0.5 for metric in METRICS}
    point = {"recipe": "r", "stages": {"dpo": {"after": measured}}}
    print_comparison([("dpo.beta=0.1 " + "x" * 60, point), ("dpo.beta=0.5", point)])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, said)) <= 80
    headings = [cell.strip() for line in said if line.startswith("┃") for cell in line.split("┃")[2:-1]]
    assert headings == [metric.short for metric in METRICS]
