"""Mixtures: sources of their own formats, held-out prompts, shares, and refusals."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from alignctl.data.joining import part_of
from alignctl.data.section import read_section
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError
from alignctl.methods.registry import EVERY_OTHER_COLUMN, RowColumn

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

MARGIN = (RowColumn(name="margin", number=True, missing=0.0),)


@pytest.fixture
def sources(tmp_path):
    """60 pairs, and 40 in other columns, of which two have prompts of the others and one cannot be used."""
    first = [{"prompt": f"a{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": i} for i in range(60)]
    second = [{"q": f"b{i}", "good": f"yes {i}", "bad": f"no {i}"} for i in range(40)]
    second[3]["q"], second[4]["q"], second[5]["bad"] = "A 3", "a4", ""
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file, rows in zip(files, (first, second), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    return [{"path": str(files[0]), "weight": 1}, {"path": str(files[1]), "weight": 1, "columns": columns}]


def read(mix, kind="preferences", columns=(), seed=0, count_tokens=None, **settings):
    return read_section(DataSettings(mix=mix, **settings), kind, seed, columns, count_tokens=count_tokens)


def test_rows_of_both_sources_by_their_weights(sources):
    train, held = read(sources, eval_rows=10)
    ledger = train.ledger
    assert [(part.read, part.rows, part.share, part.weight) for part in ledger.parts] == [
        (60, 34, 0.5, 1), (40, 34, 0.5, 1),
    ]  # fmt: skip
    assert len(train.dataset) == ledger.kept == 68
    assert [part.rows for part in held.ledger.parts] == [5, 5]
    assert ledger.skipped == {66: "the rejected completion is empty"}
    assert train.places.of(66)[1] == 6
    assert ledger.kept + len(ledger.skipped) + ledger.held_out + ledger.left_over == ledger.read == 100
    numbers = dict(zip(train.numbers, train.dataset["prompt"], strict=True))
    assert all(prompt in (f"a{number - 1}", f"b{number - 61}", "A 3", "a4") for number, prompt in numbers.items())
    sides = [{prompt.lower().replace(" ", "") for prompt in part.dataset["prompt"]} for part in (train, held)]
    assert not sides[0] & sides[1]
    assert asdict(ledger)["parts"][0]["source"] == sources[0]["path"]


def test_no_prompt_of_one_source_is_held_out_of_another(sources):
    """Whatever is held out: two prompts are in both sources."""
    for seed in range(6):
        parts = read(sources, seed=seed, eval_rows=0.2)
        sides = [{prompt.lower().replace(" ", "") for prompt in part.dataset["prompt"]} for part in parts]
        assert not sides[0] & sides[1]


def test_the_same_seed_gives_the_same_rows_in_the_same_order(sources, tmp_path, monkeypatch):
    one, _ = read(sources)
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "another"))
    again, _ = read(sources)
    other, _ = read(sources, seed=1)
    assert one.numbers == again.numbers != other.numbers
    assert list(one.dataset) == list(again.dataset)


def test_by_tokens(sources):
    def count_tokens(rows):
        return np.array([1 if prompt.startswith("a") else 9 for prompt in rows["prompt"]])

    train, _ = read(sources, mix_by="tokens", eval_rows=0, count_tokens=count_tokens)
    first, second = train.ledger.parts
    assert first.share == pytest.approx(0.5, abs=0.05)
    assert (first.rows, first.tokens, second.rows) == (60, 60, 7)


def test_without_weights_every_row_is_there_once(sources):
    train, held = read([{key: value for key, value in one.items() if key != "weight"} for one in sources], eval_rows=0)
    assert held is None
    assert sorted(train.numbers) == [number for number in range(1, 101) if number != 66]


def test_columns_that_one_source_lacks(sources):
    train, _ = read(sources, columns=MARGIN, eval_rows=0)
    assert {number: margin for number, margin in zip(train.numbers, train.dataset["margin"], strict=True)} == {
        number: float(number - 1) if number <= 60 else 0.0 for number in train.numbers
    }
    asked, _ = read(sources, kind="prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    by_number = dict(zip(asked.numbers, asked.dataset["margin"], strict=True))
    assert all(margin == (number - 1 if number <= 60 else None) for number, margin in by_number.items())


def test_pairs_beside_labelled_answers(sources, tmp_path):
    file = tmp_path / "thumbs.jsonl"
    rows = [{"prompt": f"t{i}", "completion": "c", "label": i % 2 == 0} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = read([sources[0], {"path": str(file), "weight": 1}], kind="feedback", eval_rows=0)
    assert set(train.dataset.column_names) == {"prompt", "completion", "label"}
    assert train.format.kind == "feedback"
    assert [part.rows for part in train.ledger.parts] == [20, 20]


def test_given_rows_are_held_out_and_looked_at(sources, tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"prompt": "a 7", "chosen": "a", "rejected": "b"}) + "\n")
    train, held = read([sources[0]], eval_path=str(file))
    assert len(train.dataset) == 60
    assert (held.ledger.kept, held.ledger.shared_prompts) == (1, 1)


def test_named_sets_lie_one_behind_another(sources, tmp_path):
    files = {}
    for name, prompts in (("maths", ["x", "A 3"]), ("chat", ["y"])):
        files[name] = str(tmp_path / f"{name}.jsonl")
        rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in ({"mix": sources}, {"path": sources[0]["path"]}):
        train, held = read_section(DataSettings(**given, eval=files), "preferences", seed=0)
        assert held.dataset["prompt"] == ["x", "A 3", "y"]
        assert [(part.name, part.rows) for part in held.ledger.parts] == [("maths", 2), ("chat", 1)]
        assert part_of(held.ledger, np.asarray(held.numbers)).tolist() == [0, 0, 1]
        assert held.ledger.shared_prompts == 1
        assert train.ledger.held_out == 0


def test_text_and_messages_are_no_mixture(sources, tmp_path):
    file = tmp_path / "chat.jsonl"
    said = [[{"role": role, "content": text}] for role, text in (("user", "p"), ("assistant", "a"), ("assistant", "b"))]
    file.write_text(json.dumps(dict(zip(("prompt", "chosen", "rejected"), said, strict=True))))
    with pytest.raises(RequestError, match=r"chat.jsonl \(chosen as messages, .* have another form than .*first.jsonl"):
        read([sources[0], {"path": str(file)}])


def test_conversations_beside_prompts_and_completions_are_made_completions(tmp_path):
    """Of conversations as a whole other tokens are trained on."""
    said = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    files = [tmp_path / "chat.jsonl", tmp_path / "alpaca.jsonl"]
    for file, row in zip(files, ({"messages": said}, {"instruction": "Do", "output": "Done"}), strict=True):
        file.write_text(json.dumps(row))
    mix = [{"path": str(file)} for file in files]
    with pytest.raises(
        RequestError, match=r"chat.jsonl has whole conversations, .*alpaca.jsonl prompts and"
    ) as refused:
        read(mix, "demonstrations", eval_rows=0)
    assert "`format: weighed_messages` in the entry of" in refused.value.problems[0].hint
    train, _ = read([mix[0] | {"format": "weighed_messages"}, mix[1]], "demonstrations", eval_rows=0)
    assert sorted(map(len, train.dataset["prompt"])) == [1, 1, 3]


def test_rows_with_tools_stand_beside_rows_without(tmp_path):
    asked, said = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    calls = said | {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"prompt": [asked], "chosen": [said], "rejected": [said | {"content": "y"}]}]
    rows.append(rows[0] | {"chosen": [calls], "tools": [tool]})
    files = [tmp_path / "plain.jsonl", tmp_path / "calling.jsonl"]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row))
    for order in (files, files[::-1]):
        train, _ = read([{"path": str(file)} for file in order], eval_rows=0)
        found = {len(row["tools"] or []): row for row in train.dataset}
        assert found == {0: rows[0] | {"tools": None}, 1: rows[1]}


def test_ties_of_every_source_are_counted(tmp_path):
    tied, clear = ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": votes} for votes in ([1, 2], [1, 1]))
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    for source, rows in zip(sources, ([clear, tied], [tied, clear, clear]), strict=True):
        with open(source["path"], "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    ledger = read(sources, eval_rows=0)[0].ledger
    assert (ledger.read, ledger.kept, ledger.ties) == (5, 3, [2, 3])
    assert [part.agreement for part in ledger.parts] == [0.5, pytest.approx(2 / 3)]
