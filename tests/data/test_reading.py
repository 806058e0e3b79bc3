"""Reading real and odd files: the ledger, the formats of files, held-out rows, plain text."""

import json
from dataclasses import replace

import pytest
from datasets import Dataset

from alignctl.data.reading import read_split
from alignctl.data.recast import as_kind, as_plain_text
from alignctl.data.rows import said_of, shared_said
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError
from alignctl.methods.registry import EVERY_OTHER_COLUMN, RowColumn

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

MARGIN = (RowColumn(name="margin", number=True, missing=0.0),)
PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return str(path)


def read(path, kind="preferences", columns=(), **settings):
    return read_split(DataSettings(path=str(path), **settings), kind, seed=0, columns=columns)


def test_hh_harmless_base_as_it_is(shared_data):
    folder = shared_data / "preference" / "hh_harmless_base"
    train, held_out = read(folder / "train.jsonl", eval_path=str(folder / "test.jsonl"))
    assert train.ledger.format == "hh_rlhf"
    assert (train.ledger.read, train.ledger.kept) == (1812, 1804)
    assert train.ledger.skipped == {
        65: "the chosen completion is empty",
        406: "the chosen completion is empty",
        721: "the chosen completion is empty",
        970: "the transcripts do not share a prompt",
        1301: "the transcripts do not share a prompt",
        1521: "the transcripts do not share a prompt",
        1523: "the transcripts do not share a prompt",
        1594: "the transcripts do not share a prompt",
    }
    assert (held_out.ledger.read, held_out.ledger.kept, list(held_out.ledger.skipped)) == (500, 499, [250])
    row = train.dataset[0]
    assert row["prompt"][0] == {"role": "user", "content": "what are some pranks with a pen i can do?"}
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert row["chosen"][0]["content"].startswith("No, sorry!  All of these involve a pen")


def test_bad_rows_can_fail_the_request(shared_data):
    path = shared_data / "preference" / "hh_harmless_base" / "train.jsonl"
    with pytest.raises(RequestError, match=r"8 of 1812 rows cannot be used \(row 65: the chosen"):
        read(path, on_bad_row="fail")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    train, held_out = read(write(tmp_path / f"rows{suffix}", PAIRS), eval_rows=0)
    assert list(train.dataset) == PAIRS
    assert held_out is None


def test_real_sets_of_other_formats(shared_data):
    for path, kind, name in [
        ("preference/hh_helpful_base/test.jsonl", "preferences", "hh_rlhf"),
        ("preference/llms_from_scratch_pref/test.jsonl", "preferences", "instruction_pair"),
        ("preference/oasst_en100/pairs_test.jsonl", "preferences", "preference"),
        ("preference/hhh_alignment.jsonl", "preferences", "preference"),
        ("sft/oasst_en100/best_test.jsonl", "demonstrations", "messages"),
        ("sft/llms_from_scratch/test.jsonl", "demonstrations", "instruction"),
        ("sft/dolly_open_qa/test.jsonl", "demonstrations", "text"),
    ]:
        train, _ = read(shared_data / path, kind, eval_rows=0)
        assert train.ledger.format == name
        assert train.ledger.kept >= 0.98 * train.ledger.read, path


def test_files_are_read_as_if_they_were_one(tmp_path):
    """Each row knows its own file, and a file that cannot be read is named."""
    write(tmp_path / "b.jsonl", [*PAIRS[4:], {"prompt": "p", "chosen": "a", "rejected": "a"}])
    write(tmp_path / "a.jsonl", PAIRS[:4])
    train, _ = read(tmp_path, eval_rows=0)
    assert list(train.dataset) == PAIRS
    assert list(train.ledger.skipped) == [11]
    assert train.places.of(11) == (str(tmp_path / "b.jsonl"), 7)
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(RequestError, match="c.jsonl: line 1 is not JSON"):
        read(tmp_path)


def test_a_list_of_files_is_read_in_its_order(tmp_path):
    files = [write(tmp_path / "b.jsonl", PAIRS[4:]), write(tmp_path / "a.jsonl", PAIRS[:4])]
    train, held = read_split(DataSettings(path=files, eval_path=files[:1]), "preferences", seed=0)
    assert list(train.dataset) == PAIRS[4:] + PAIRS[:4]
    assert list(held.dataset) == PAIRS[4:]


def test_rows_that_differ_are_counted_and_named(tmp_path):
    rows = [*PAIRS[:3], {"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "p", "chosen": "a"}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), eval_rows=0)
    assert train.ledger.kept == 3
    assert train.ledger.skipped == {
        4: "chosen and rejected are the same",
        5: "the column 'rejected' is missing or empty",
    }


def test_a_torn_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(PAIRS[1])[:-5] + "\n" + json.dumps(PAIRS[2]) + "\n")
    with pytest.raises(RequestError, match="line 2 is not JSON"):
        read(path)


def test_no_usable_row_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "", "rejected": ""}])
    with pytest.raises(RequestError, match="rows can be used; row 1: "):
        read(path)


def test_limits_take_the_first_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIRS)
    train, held_out = read(path, eval_path=path, limit=4, eval_limit=2)
    assert list(train.dataset) == PAIRS[:4]
    assert list(held_out.dataset) == PAIRS[:2]


def test_prompts_that_look_alike_are_on_one_side(tmp_path):
    rows = [
        {"prompt": ("What is {}?", "what  is {} ?")[i % 2].format(i // 2), "chosen": f"good {i}", "rejected": "bad"}
        for i in range(40)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    train, held = read(path, eval_rows=0.25)
    assert len(held.dataset) == 10
    asked = [{"".join(prompt.lower().split()) for prompt in part.dataset["prompt"]} for part in (train, held)]
    assert [len(prompts) for prompts in asked] == [15, 5]
    assert not asked[0] & asked[1]


def test_prompts_that_are_on_both_sides_are_counted(tmp_path):
    given = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in ("P 1", "p  2", "p10", "other")]
    path = write(tmp_path / "held.jsonl", given)
    _, held = read(write(tmp_path / "rows.jsonl", PAIRS), eval_path=path)
    assert held.ledger.shared_prompts == 2
    assert "held.jsonl: 2 of 4 held-out rows have a prompt that training rows have, too" in shared_said(held.ledger)


def test_turns_of_a_conversation_are_on_one_side(tmp_path):
    """Each is a row of its own, with a prompt that nobody else has."""
    said = [{"role": "assistant", "content": "a", "weight": weight} for weight in (1, 0, 1)]
    rows = [
        {"messages": [part for turn in said for part in ({"role": "user", "content": f"q{i}"}, turn)]}
        for i in range(20)
    ]
    train, held = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0.2)
    assert (len(train.numbers), len(held.numbers)) == (32, 8)
    assert not set(train.numbers) & set(held.numbers)
    assert (train.ledger.held_out, held.ledger.read) == (4, 4)


def test_held_out_rows_share_no_prompt(tmp_path):
    rows = [{"prompt": f"p{i // 3}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(90)]
    path = write(tmp_path / "rows.jsonl", rows)
    train, held_out = read(path, eval_rows=10)
    assert len(held_out.dataset) == 9  # three prompts of three rows; a fourth would be too many
    assert len(train.dataset) + len(held_out.dataset) == 90
    assert not set(train.dataset["prompt"]) & set(held_out.dataset["prompt"])
    again, _ = read(path, eval_rows=10)
    assert list(again.dataset) == list(train.dataset)


def test_a_system_prompt_in_common_is_no_common_prompt(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [system, {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(50)
    ]
    train, held_out = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=10)
    assert (len(train.dataset), len(held_out.dataset)) == (40, 10)


def test_messages_become_the_customary_text(tmp_path):
    hh = "\n\nHuman: Hi\n\nAssistant:"
    path = write(tmp_path / "hh.jsonl", [{"chosen": f"{hh} Good", "rejected": f"{hh} Bad"}])
    rows, _ = read(path, eval_rows=0)
    assert list(as_plain_text(rows, "it").dataset) == [{"prompt": hh, "chosen": " Good", "rejected": " Bad"}]

    path = write(tmp_path / "ins.jsonl", [{"instruction": "Do", "input": "it", "chosen": "A", "rejected": "B"}])
    rows, _ = read(path, eval_rows=0)
    assert list(as_plain_text(rows, "it").dataset) == [{"prompt": "Do\n\nit\n\n", "chosen": "A", "rejected": "B"}]


def test_conversations_without_a_template_are_refused(tmp_path):
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    rows, _ = read(write(tmp_path / "m.jsonl", [{"messages": messages}]), "demonstrations", eval_rows=0)
    with pytest.raises(RequestError, match="no chat template") as raised:
        as_plain_text(rows, "stories260K")
    assert "model.chat_template" in raised.value.problems[0].hint


def test_settings_are_not_changed():
    settings = DataSettings(path="builtin:quickstart")
    before = replace(settings)
    read_split(settings, "preferences", seed=0)
    assert settings == before


def test_real_feedback(shared_data):
    votes, _ = read(shared_data / "kto" / "oasst_en100" / "votes_train.jsonl", "feedback")
    assert votes.ledger.format == "feedback"
    assert set(votes.dataset.column_names) == {"prompt", "completion", "label"}
    assert set(votes.dataset["label"]) == {True, False}
    mix, _ = read(shared_data / "kto" / "llamafactory_kto_en_demo.jsonl", "feedback", eval_rows=0)
    assert mix.ledger.format == "messages_feedback"
    assert mix.ledger.kept == 300
    assert mix.dataset[0]["completion"][0]["role"] == "assistant"


def test_pairs_are_taken_apart_for_methods_that_need_labels(tmp_path):
    pairs, _ = read(write(tmp_path / "rows.jsonl", PAIRS), "feedback", eval_rows=2)
    assert pairs.format.kind == "preferences"  # still pairs: what is held out is measured as pairs
    single = as_kind(pairs, "feedback")
    assert len(single.dataset) == 2 * len(pairs.dataset)
    assert single.dataset[0] == {
        "prompt": pairs.dataset[0]["prompt"],
        "completion": pairs.dataset[0]["chosen"],
        "label": True,
    }
    assert single.dataset[1]["completion"] == pairs.dataset[0]["rejected"]
    assert sum(single.dataset["label"]) == len(pairs.dataset)


def test_labels_that_are_none_are_skipped(tmp_path):
    rows = [{"prompt": "p", "completion": f"c{i}", "label": label} for i, label in enumerate([True, False, None, True])]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "feedback", eval_rows=0)
    assert train.dataset["label"][:] == [True, False, True]
    assert train.ledger.skipped == {3: "the column 'label' is missing or empty"}


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(None, [0.5, 2.0]), ("margin", [0.5, 2.0]), ("score", [4.0, 1.0]), (["score", "margin"], [3.5, -1.0])],
)
def test_margins_come_from_columns(tmp_path, margin, expected):
    rows = [row | {"margin": m, "score": s} for row, m, s in zip(PAIRS, (0.5, 2.0), (4.0, 1.0), strict=False)]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), eval_rows=0, margin=margin, columns=MARGIN)
    assert train.dataset["margin"][:] == expected


def test_a_margin_that_is_not_there_or_no_number_is_told(tmp_path):
    file = write(
        tmp_path / "rows.jsonl", [row | {"score": text} for row, text in zip(PAIRS, ("1.5", "high"), strict=False)]
    )
    with pytest.raises(RequestError, match="`data.margin` names the column `scores`") as refused:
        read(file, margin="scores", columns=MARGIN)
    assert "prompt, chosen, rejected, score" in refused.value.problems[0].hint
    train, _ = read(file, eval_rows=0, margin="score", columns=MARGIN)
    assert train.dataset["margin"][:] == [1.5]
    assert "the margin is not a number" in train.ledger.skipped[2]


def test_a_margin_is_read_only_where_it_is_used(tmp_path):
    """Of other methods it must not cost a row; and a row without one has none."""
    file = write(
        tmp_path / "rows.jsonl", [row | {"margin": m} for row, m in zip(PAIRS, (0.5, None, 1.0), strict=False)]
    )
    assert read(file, eval_rows=0)[0].dataset.column_names == ["prompt", "chosen", "rejected"]
    assert read(file, eval_rows=0, columns=MARGIN)[0].dataset["margin"][:] == [0.5, 0.0, 1.0]
    words = write(tmp_path / "words.jsonl", [row | {"margin": "slightly"} for row in PAIRS])
    assert read(words, eval_rows=0)[0].ledger.kept == len(PAIRS)
    without = write(tmp_path / "eval.jsonl", PAIRS)
    _, held_out = read(file, eval_path=without, margin=["margin"], columns=MARGIN)
    assert "margin" not in held_out.dataset.column_names


OWN = (
    RowColumn(name="beta", number=True, missing=None),
    RowColumn(name="weight", number=True, missing=1.0),
    RowColumn(name="source", number=False, missing="unknown"),
    RowColumn(name="elsewhere", number=True, missing=None),
)


def with_columns(count=10):
    """Pairs of which the second has no beta, the third no weight and no source."""
    rows = [
        row | {"beta": 0.5 * number, "weight": number, "source": f"s{number}", "spare": number}
        for number, row in enumerate(PAIRS[:count])
    ]
    rows[1]["beta"] = rows[2]["weight"] = rows[2]["source"] = None
    return rows


def test_declared_columns_are_kept_and_no_others(tmp_path):
    train, _ = read(write(tmp_path / "rows.jsonl", with_columns(4)), columns=OWN, eval_rows=0)
    assert train.columns == OWN[:3]
    assert train.dataset.column_names == ["prompt", "chosen", "rejected", "beta", "weight", "source"]
    kept = [{name: row[name] for name in ("beta", "weight", "source")} for row in train.dataset]
    assert kept == [
        {"beta": 0.0, "weight": 0.0, "source": "s0"},
        {"beta": 1.0, "weight": 1.0, "source": "unknown"},
        {"beta": 1.5, "weight": 3.0, "source": "s3"},
    ]
    assert train.ledger.skipped == {2: "the column 'beta' is missing or empty"}
    assert train.numbers == [1, 3, 4]
    plain = write(tmp_path / "plain.jsonl", PAIRS)
    assert read(plain, columns=OWN, eval_rows=0)[0].columns == ()


def test_what_is_no_finite_number_is_no_margin(tmp_path):
    rows = [PAIRS[0] | {"margin": value} for value in (1.0, float("nan"), float("inf"), 2.0)]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), columns=MARGIN, eval_rows=0)
    assert train.dataset["margin"][:] == [1.0, 2.0]
    assert train.ledger.skipped[2] == "the margin is not a finite number: nan"


def test_held_out_rows_have_the_columns_too(tmp_path):
    file = write(tmp_path / "rows.jsonl", with_columns())
    train, held_out = read(file, columns=OWN, eval_rows=1)
    assert held_out.dataset[0]["beta"] == 0.5 * int(held_out.dataset[0]["prompt"][1:])
    _, elsewhere = read(file, columns=OWN, eval_path=write(tmp_path / "eval.jsonl", with_columns(3)))
    assert elsewhere.dataset["beta"][:] == [0.0, 1.0]
    assert elsewhere.columns == train.columns
    with pytest.raises(RequestError, match=r"the column `beta`, and the held-out rows of .*plain.jsonl do not"):
        read(file, columns=OWN, eval_path=write(tmp_path / "plain.jsonl", PAIRS))


def test_a_pair_that_is_taken_apart_gives_both_completions_its_columns(tmp_path):
    pairs, _ = read(write(tmp_path / "rows.jsonl", with_columns(4)), "feedback", columns=OWN, eval_rows=0)
    single = as_kind(pairs, "feedback")
    assert single.columns == OWN[:3]
    assert single.dataset["weight"][:] == [0.0, 0.0, 1.0, 1.0, 3.0, 3.0]
    assert single.dataset[3] == {
        "prompt": "p2", "completion": "bad 2", "label": False, "beta": 1.0, "weight": 1.0, "source": "unknown",
    }  # fmt: skip


def test_every_other_column_is_kept_as_it_is(tmp_path):
    rows = [{"prompt": f"p{i}", "labels": [i], "margin": None, "row": {"a": i}, "answer": 1 / (i + 3)} for i in (0, 1)]
    file = write(tmp_path / "rows.jsonl", rows)
    prompts, _ = read(file, "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    assert list(prompts.dataset) == rows
    assert [column.name for column in prompts.columns] == ["labels", "margin", "row", "answer"]
    assert not any(column.number for column in prompts.columns)
    answer = RowColumn(name="answer", number=True, missing=0.0)
    both, _ = read(file, "prompts", columns=(EVERY_OTHER_COLUMN, answer), eval_rows=0)
    assert [(column.name, column.number) for column in both.columns if column.name == "answer"] == [("answer", True)]
    assert read(file, "prompts", eval_rows=0)[0].dataset.column_names == ["prompt"]
    pairs, _ = read(
        write(tmp_path / "pairs.jsonl", with_columns(3)), "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0
    )
    names = {column.name for column in as_kind(pairs, "prompts").columns}
    assert names == {"chosen", "rejected", "beta", "weight", "source", "spare"}


def test_between_1_and_minus_1_is_neither(tmp_path):
    """A step in between does not count. Where there is no -1, 0 is the other side."""
    said = [{"prompt": "p", "completion": f"c{label}", "label": label} for label in (1, 0, -1)]
    thumbs, _ = read(write(tmp_path / "thumbs.jsonl", said), "feedback", eval_rows=0)
    assert (thumbs.ledger.ties, list(thumbs.dataset["label"])) == ([2], [True, False])
    others, _ = read(write(tmp_path / "others.jsonl", said[:2]), "feedback", eval_rows=0)
    assert (others.ledger.ties, list(others.dataset["label"])) == ([], [True, False])
    solutions = [{"prompt": "p", "completions": ["a", "b"], "labels": one} for one in ([1, 0], [0, 0], [1, -1])]
    steps, _ = read(write(tmp_path / "steps.jsonl", solutions), "feedback", eval_rows=0)
    assert (steps.ledger.ties, list(steps.dataset["label"])) == ([2], [True, False])


def test_labels_as_pandas_writes_them(tmp_path):
    rows = [{"prompt": "p", "completion": f"c{i}", "label": label} for i, label in enumerate([1.0, 0.0])]
    assert read(write(tmp_path / "rows.parquet", rows), "feedback", eval_rows=0)[0].dataset["label"][:] == [True, False]


def test_columns_that_nothing_looks_at_are_named(tmp_path):
    """Wherever they begin, and those of messages; an empty one is none."""
    messages = [{"role": "user", "content": "p", "id": 7}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages, "empty": None}] * 30 + [{"messages": messages, "late": "x", "system": "s"}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0)
    assert train.ledger.unused == ["late", "messages.id"]
    margins, _ = read(write(tmp_path / "pairs.jsonl", with_columns(3)), columns=OWN, eval_rows=0)
    assert margins.ledger.unused == ["spare"]


def test_a_row_may_give_several(tmp_path):
    scored = [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "scores": [i, 1, 2], "beta": i} for i in range(2)]
    train, _ = read(write(tmp_path / "rows.jsonl", scored), eval_rows=0, max_pairs=2, columns=OWN)
    assert [(row["chosen"], row["rejected"], row["beta"]) for row in train.dataset] == [
        ("c", "a", 0.0), ("c", "b", 0.0), ("c", "a", 1.0), ("c", "b", 1.0),
    ]  # fmt: skip
    assert train.numbers == [1, 1, 2, 2]
    assert (train.ledger.read, train.ledger.kept) == (2, 2)


def test_the_chosen_side_stays_one_when_it_is_found_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIRS)
    for _ in range(2):
        train, held_out = read(path, "demonstrations", use="chosen", eval_rows=2)
        assert (train.format.kind, train.ledger.format) == ("demonstrations", "preference")
        assert train.dataset[0]["completion"].startswith("good")
        assert held_out.format.kind == "demonstrations"


def test_half_of_a_character_costs_its_row_alone(tmp_path):
    rows = [*PAIRS[:3], PAIRS[3] | {"chosen": "\ud800"}, PAIRS[4] | {"note": "\ud800", "\ud801": 1}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), eval_rows=0)
    assert train.numbers == [1, 2, 3, 5]
    assert train.ledger.skipped == {4: r"`chosen` has half of a character, `\ud800`: no text can have that"}
    assert train.ledger.unused == [r"\ud801", "note"]
    prompts, _ = read(tmp_path / "rows.jsonl", "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    assert prompts.dataset.column_names == ["prompt", "chosen", "rejected"]


def test_columns_of_several_types_are_left_to_who_does_not_need_them(tmp_path):
    rows = [{"prompt": "p", "answer": 1, "score": 1}, {"prompt": "q", "answer": 2, "score": "n/a"}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    assert list(train.dataset) == [{"answer": 1, "prompt": "p"}, {"answer": 2, "prompt": "q"}]
    assert train.ledger.unused == ["score"]
    needed = (RowColumn(name="score", number=False, missing=None),)
    with pytest.raises(RequestError, match="the values of the column `score` are of several types"):
        read(tmp_path / "rows.jsonl", "prompts", columns=needed, eval_rows=0)


def test_whole_numbers_are_not_made_others(tmp_path):
    rows = [{"prompt": "p", "n": n, "meta": meta} for n, meta in [(4, {})] * 1000 + [(4.5, {"a": 1})]]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    assert train.ledger.unused == ["n"]
    assert train.dataset[1000]["meta"] == {"a": 1}
    mixed = [{"prompt": "p", "list": [1, 2.5], "inside": {"a": [1]}, "floats": [1.5]} for _ in range(1000)]
    mixed.append({"prompt": "p", "list": [1], "inside": {"a": [2.5]}, "floats": [2.0]})
    train, _ = read(write(tmp_path / "rows.jsonl", mixed), "prompts", columns=(EVERY_OTHER_COLUMN,), eval_rows=0)
    assert train.ledger.unused == ["inside", "list"]
    assert train.dataset[1000] == {"prompt": "p", "floats": [2.0]}


def test_a_column_that_is_made_of_another_is_looked_at(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"delta": 0.5} for row in PAIRS])
    settings = DataSettings(path=path, eval_path=path, eval_limit=2, columns={"margin": "delta"})
    train, held_out = read_split(settings, "preferences", seed=0, columns=MARGIN)
    assert train.dataset["margin"][:] == [0.5] * len(PAIRS)
    assert "margin" not in held_out.dataset.column_names


def test_a_system_message_of_some_rows_makes_messages_of_all(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "c", "system": "s"}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0)
    assert [[m["role"] for m in prompt] for prompt in train.dataset["prompt"]] == [["user"], ["system", "user"]]


def test_a_column_that_begins_late_makes_messages_of_all_rows(tmp_path):
    plain = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(1_001)]
    late = {"prompt": "p", "completion": "c", "system": "Be brief"}
    counted = []
    settings = DataSettings(path=write(tmp_path / "rows.jsonl", [*plain, late]), eval_rows=0)
    train, _ = read_split(settings, "demonstrations", seed=0, count=counted.append)
    assert (train.ledger.kept, train.ledger.skipped, sum(counted)) == (1_002, {}, 1_002)
    assert train.dataset[0]["prompt"] == [{"role": "user", "content": "p0"}]
    assert train.dataset[-1]["prompt"][0] == {"role": "system", "content": "Be brief"}


def test_tools_and_thoughts_that_begin_late_are_kept_as_they_are(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"enum": [1, 2.5], "default": None}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked, said = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    thinks = said | {"reasoning_content": "hm", "thinking": "hm"}
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [asked], "chosen": [calls], "rejected": [thinks], "tools": [tool]},
    ]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), eval_rows=0)
    assert train.dataset[0] == {
        "prompt": [asked], "chosen": [said], "rejected": [said | {"content": "b"}], "tools": None
    }  # fmt: skip
    assert train.dataset[1] == rows[1]
    assert train.ledger.unused == []
    assert as_kind(train, "feedback").dataset[2] == {
        "prompt": [asked], "completion": [calls], "label": True, "tools": [tool]
    }  # fmt: skip
    with pytest.raises(RequestError, match="have tools, and completions are drawn to prompts without"):
        as_kind(train, "prompts")
    with pytest.raises(RequestError, match="has no chat template"):
        as_plain_text(train, "a model")


def test_what_json_has_not_costs_its_row(tmp_path):
    tool = {"name": "f", "parameters": {"most": float("nan")}}
    rows = [{"prompt": f"p{i}", "completion": "c", "tools": [tool] if i == 3 else None} for i in range(5)]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0)
    assert list(train.ledger.skipped) == [4]
    assert "`tools` has what JSON has not" in train.ledger.skipped[4]
    for number in (1 / 3, 2**70):
        rows[3]["tools"][0]["parameters"]["most"] = number
        train, _ = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0)
        assert list(train.ledger.skipped) == [4], number
        assert "would be rounded" in train.ledger.skipped[4]


def test_votes_of_real_people(shared_data):
    """Their agreement is the mean of 0.9129, 0.9289 and 0.9179, those of each two of the three."""
    train, _ = read(shared_data / "annotators" / "pandalm_testset.jsonl", eval_rows=0)
    ledger = train.ledger
    assert (ledger.format, ledger.read, ledger.kept) == ("voted", 999, 841)
    assert (len(ledger.ties), len(ledger.skipped)) == (105, 53)
    assert all("is empty" in reason for reason in ledger.skipped.values())
    assert ledger.agreement == pytest.approx((0.9129 + 0.9289 + 0.9179) / 3, abs=1e-4)
    assert "annotator1" not in ledger.unused
    assert "two people say the same of 92%; 105 of 999 are left out" in said_of(ledger)


def message(name, parent, text, rank=None):
    role = "assistant" if rank is not None else "prompter"
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}


def test_rows_that_are_messages_of_trees_are_put_together(tmp_path):
    rows = [message("1", None, "p"), message("2", "1", "a", 1), message("3", None, "q"), message("4", "1", "b", 0)]
    rows += [message("5", "3", "c", 1), message("6", "3", "d", 0)]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), eval_rows=0)
    assert [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in train.dataset] == [
        ("p", "b"), ("q", "d"),
    ]  # fmt: skip
    assert (train.ledger.format, train.ledger.read) == ("tree", 2)
    assert [train.places.of(number).line for number in (1, 2)] == [1, 3]
    train, _ = read(tmp_path / "rows.jsonl", "demonstrations", eval_rows=0)
    assert [row["messages"][1]["content"] for row in train.dataset] == ["b", "d"]
    for odd, reason in ((message("1", "2", "p"), "in a circle"), (message("2", None, "p"), "is `2`, which is none or")):
        with pytest.raises(RequestError, match=reason):
            read(write(tmp_path / "odd.jsonl", [odd, *rows[1:]]), eval_rows=0)


def test_weights_that_begin_late_are_honoured_in_all_rows(tmp_path):
    asked, said = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [asked, said]}] * 30
    rows += [{"messages": [asked, said | {"weight": 0}, asked, said | {"content": "b"}]}]
    train, _ = read(write(tmp_path / "rows.jsonl", rows), "demonstrations", eval_rows=0)
    assert (train.ledger.format, train.ledger.kept, train.ledger.skipped) == ("weighed_messages", 31, {})
    assert train.dataset[30] == {"prompt": [asked, said, asked], "completion": [said | {"content": "b"}]}
    named, _ = read(tmp_path / "rows.jsonl", "demonstrations", eval_rows=0, format="messages")
    assert list(named.ledger.skipped) == [31]
