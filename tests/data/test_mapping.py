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


@pytest.mark.parametrize(
    "template",
    [
        "{{ row.context }} {{ row.instruction }}",
        "{% for name in ['context', 'instruction'] %}{{ row[name] }} {% endfor %}",
        "{{ row.get('context') }} {% if row.id %}{{ instruction }}{% endif %}",
    ],
)
def test_columns_that_a_template_reads_in_any_way_are_its_own(template):
    row = {"instruction": "q", "context": "c", "output": "a", "other": "o", "id": 1}
    reading = how_to_read([row], "demonstrations", columns={"completion": "output"}, template=template)
    assert reading.mapped(row)["prompt"].strip() == "c q"
    assert {"instruction", "context", "output"} <= reading.uses
    assert "other" not in reading.uses
    assert not {"instruction", "context"} & reading.mapped(row).keys()


def test_an_object_that_columns_are_made_of_is_none_itself():
    row = {"input": {"question": "q"}, "output": {"answer": "a"}}
    reading = how_to_read([row], "demonstrations", columns={"instruction": "input.question", "output": "output.answer"})
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert reading.format.rows(reading.mapped(row)) == [{"prompt": [asked], "completion": [said]}]


def test_what_is_used_within_a_list_is_used():
    row = {"question": "q", "said": [{"answer": "a", "rank": 1, "model": "m"}, {"answer": "b", "rank": 0}]}
    columns = {"prompt": "question", "completions": "said"}
    assert {"said", "said.answer", "said.rank"} <= how_to_read([row], "preferences", columns=columns).uses
    columns = {"prompt": "question", "chosen": "said.1.answer", "rejected": "said.0.answer"}
    uses = how_to_read([row], "preferences", columns=columns).uses
    assert "said.answer" in uses
    assert "said.rank" not in uses


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
