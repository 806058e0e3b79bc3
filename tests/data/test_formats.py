"""Row formats: each converter on rows written out by hand, and what is refused with which reason."""

import pytest

from alignctl.data.formats import FORMATS, detect_format
from alignctl.data.messages import BadRow


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: "

CONVERTED = [
    (
        "hh_rlhf",
        {"chosen": HH + "Good", "rejected": HH + "Bad"},
        {
            "prompt": [user("Hi"), assistant("Hello"), user("And?")],
            "chosen": [assistant("Good")],
            "rejected": [assistant("Bad")],
        },
    ),
    (
        "instruction_pair",
        {"instruction": "Say it", "chosen_response": "A", "rejected_response": "B", "source": "x"},
        {"prompt": [user("Say it")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    (
        "instruction_pair",
        {"instruction": "Say it", "input": "aloud", "output": "A", "chosen": "A", "rejected": "B"},
        {"prompt": [user("Say it\n\naloud")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        "preference",  # as in HuggingFaceH4/ultrafeedback_binarized
        {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "preference",
        {"prompt": [user("p")], "chosen": [assistant("a") | {"weight": 1}], "rejected": [assistant("b")]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "conversation_pair",
        {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "feedback",
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "c", "label": True},
    ),
    (
        "feedback",
        {"prompt": "p", "completion": [assistant("c")], "label": "False"},
        {"prompt": [user("p")], "completion": [assistant("c")], "label": False},
    ),
    (
        "messages_feedback",
        {"messages": [user("p"), assistant("a")], "label": 0},
        {"prompt": [user("p")], "completion": [assistant("a")], "label": False},
    ),
    (
        "messages",
        {"messages": [user("p"), assistant("a")]},
        {"messages": [user("p"), assistant("a")]},
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
        {"messages": [user("p"), assistant("a")]},
    ),
    ("prompt_completion", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    (
        "instruction",
        {"instruction": "Do", "input": "", "output": "Done"},
        {"prompt": [user("Do")], "completion": [assistant("Done")]},
    ),
    ("prompt", {"prompt": "p"}, {"prompt": "p"}),
    ("text", {"text": "### Human: a ### Assistant: b"}, {"text": "### Human: a ### Assistant: b"}),
]


@pytest.mark.parametrize(
    ("name", "row", "expected"), CONVERTED, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CONVERTED)]
)
def test_detected_and_converted(name, row, expected):
    row_format = detect_format([row], FORMATS[name].kind)
    assert row_format.name == name
    assert row_format.convert(row) == expected


def test_every_format_is_tested():
    assert {name for name, _, _ in CONVERTED} == set(FORMATS)


def test_parts_of_a_message_are_joined():
    said = {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
    assert FORMATS["messages"].convert({"messages": [user("p"), said]})["messages"][1] == assistant("Hello")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": [{"type": "image", "url": "x"}]}, "parts that are not text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "calls tools"),
        ({"role": "assistant", "content": {"a": 1}}, "is dict, not text"),
    ],
)
def test_what_is_not_text_is_a_bad_row(message, reason):
    with pytest.raises(BadRow, match=reason):
        FORMATS["messages"].convert({"messages": [user("p"), message, assistant("a")]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": HH + "a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "do not share a prompt"),
        ({"chosen": HH + "a", "rejected": HH}, "the rejected completion is empty"),
        ({"chosen": HH + " ", "rejected": HH + "b"}, "the chosen completion is empty"),
        ({"chosen": HH + "a", "rejected": HH + "a"}, "are the same"),
        ({"chosen": HH + "a\n\nHuman: bye", "rejected": HH + "b"}, "does not end with the assistant"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "the chosen completion is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "must all be text"),
        ({"instruction": " ", "chosen": "a", "rejected": "b"}, "the instruction is empty"),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "do not share a prompt",
        ),
    ],
)
def test_bad_preference_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        detect_format([row], "preferences").convert(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("p")]}, "does not end with an answer"),
        ({"conversations": [{"from": "martian", "value": "p"}]}, "unknown speaker `martian`"),
        ({"prompt": "p", "completion": " "}, "the completion is empty"),
        ({"text": " "}, "the text is empty"),
    ],
)
def test_bad_demonstration_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        detect_format([row], "demonstrations").convert(row)


def test_a_named_format_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="holds demonstrations, but preferences are needed"):
        detect_format([{"text": "x"}], "preferences", "text")


def test_messages_written_as_text_are_refused():
    row = {"prompt": "[{'role': 'user', 'content': 'p'}]", "chosen": "[{'role': 'assistant'", "rejected": "x"}
    with pytest.raises(ValueError, match="messages are written as text"):
        detect_format([row], "preferences")


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "c"}, {"messages": [user("p"), assistant("a")]}])
def test_judged_answers_are_no_demonstrations(row):
    assert detect_format([row], "demonstrations")
    with pytest.raises(ValueError, match="are no demonstrations"):
        detect_format([row | {"label": False}], "demonstrations")


def test_a_transcript_round_trips():
    row = {"chosen": HH + "Good", "rejected": HH + "Bad"}
    converted = FORMATS["hh_rlhf"].convert(row)
    assert FORMATS["hh_rlhf"].as_text(converted["prompt"]) == HH.rstrip()
