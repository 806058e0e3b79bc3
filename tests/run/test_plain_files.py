"""Rows that training writes while it goes: what is torn of them costs nothing else."""

import json

import pytest

from alignctl.run.files import keep_steps, read_json_lines

ROWS = [{"step": step, "loss": 1.0} for step in range(1, 9)]
TORN = ['{"step": 3, "lo', "[3]", "null", '{"loss": 1.0}', "\0" * 20, b'{"step": 3, "a": "\xff"}', "[" * 100_000]


def written(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_a_torn_line_in_the_middle_costs_that_line_alone(tmp_path, torn):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    lines[2] = (torn if isinstance(torn, bytes) else torn.encode()) + b"\n"
    path = written(tmp_path / "metrics.jsonl", lines)
    assert [row for row in read_json_lines(path) if "step" in row] == ROWS[:2] + ROWS[3:]
    said = keep_steps(path, lambda step: step <= 7)
    assert said == f"metrics.jsonl: line 3 cannot be read, and set aside in {path}.damaged"
    assert read_json_lines(path) == ROWS[:2] + ROWS[3:7]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == lines[2]
    assert keep_steps(path, lambda step: True) is None


def test_a_line_that_was_being_written_is_left_out_without_a_word(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [json.dumps(ROWS[0]) + "\n", '{"step": 2, "lo'])
    assert read_json_lines(path) == ROWS[:1]
    assert keep_steps(path, lambda step: True) is None
    assert read_json_lines(path) == ROWS[:1]
    assert keep_steps(tmp_path / "none.jsonl", lambda step: True) is None
