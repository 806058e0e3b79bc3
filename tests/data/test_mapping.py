"""Columns under other names, inside of others, and prompts that are written by a template."""

import pytest

from alignctl.data.mapping import how_to_read
from alignctl.data.messages import BadRow

ROW = {"input": {"question": "q", "turns": ["x", "y"]}, "context": "c", "good": "a", "prompt": "other", "a.b": "r"}


def test_columns_under_other_names_and_inside_of_others():
    columns = {"prompt": "input.question", "chosen": "good", "rejected": "a.b"}
    reading = how_to_read([ROW], "preferences", columns=columns)
    assert reading.format.rows(reading.mapped(ROW)) == [{"prompt": "q", "chosen": "a", "rejected": "r"}]
    assert {"input", "good", "a.b"} <= reading.uses
    assert "context" not in reading.uses
    last = how_to_read([ROW], "demonstrations", columns={"prompt": "input.turns.0", "completion": "input.turns.-1"})
    assert last.format.rows(last.mapped(ROW)) == [{"prompt": "x", "completion": "y"}]


def test_a_column_that_no_row_has_is_named():
    with pytest.raises(ValueError, match="the rows have no `input.answer`: they have `input`, `context`"):
        how_to_read([ROW], "prompts", columns={"prompt": "input.answer"})


def test_a_template_writes_the_prompt():
    template = "{{ context }}: {{ input.question }}{% if good %}?{% endif %}\n"
    reading = how_to_read([ROW], "demonstrations", columns={"completion": "good"}, template=template)
    assert reading.format.rows(reading.mapped(ROW)) == [{"prompt": "c: q?\n", "completion": "a"}]
    assert {"context", "input", "good"} <= reading.uses
    of_row = how_to_read([{"a b": 1, "c": None}], "prompts", template="{{ row['a b'] }}{{ c }}")
    assert of_row.mapped({"a b": 1, "c": None}) == {"prompt": "1"}
    assert "a b" in of_row.uses


def test_what_a_template_writes_is_not_read_twice():
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s"}
    template = "{{ system }} {{ instruction }}"
    reading = how_to_read([row], "demonstrations", columns={"completion": "output"}, template=template)
    assert reading.format.rows(reading.mapped(row)) == [{"prompt": "s q", "completion": "a"}]


def test_a_column_that_nobody_looks_at_is_not_made():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "delta": 1.0, "context": "c"}
    with pytest.raises(ValueError, match="`data.columns={margin: delta}` would have no effect"):
        how_to_read([row], "preferences", columns={"margin": "delta"})
    reading = how_to_read([row], "preferences", columns={"margin": "delta"}, beside=["margin"])
    assert reading.widened(row) == row | {"margin": 1.0}
    demonstration = {"instruction": "q", "output": "a", "context": "c"}
    with pytest.raises(ValueError, match="`data.template` would have no effect"):
        how_to_read([demonstration], "demonstrations", template="{{ context }}")


def test_a_template_is_refused_or_its_row_is():
    with pytest.raises(ValueError, match="`data.template` is no template: "):
        how_to_read([ROW], "prompts", template="{% if %}")
    reading = how_to_read([ROW], "prompts", template="{{ good }}")
    with pytest.raises(BadRow, match="`data.template`: 'good' is undefined"):
        reading.mapped({})


@pytest.mark.parametrize("reach", ["{{ good.__class__.__mro__ }}", "{{ input.update({'a': 1}) }}", "{{ 1 / 0 }}"])
def test_a_template_reaches_nothing_but_the_row(reach):
    with pytest.raises(ValueError, match="`data.template`: "):
        how_to_read([ROW], "prompts", template=reach)
