"""Row formats: each converter on rows written out by hand, and what is refused with which reason."""

import pytest

from alignctl.data.formats import FORMATS, detect_format
from alignctl.data.messages import BadRow, Tie


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def prompter(text, *replies):
    return {"text": text, "role": "prompter", "replies": list(replies)}


def reply(text, rank):
    return {"text": text, "role": "assistant", "rank": rank, "replies": []}


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
        "text_pair",  # TRL's implicit prompt
        {"chosen": "The sky is blue.", "rejected": "The sky is black.", "id": 7},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
    ),
    (
        "text_pair",
        {"chosen": "Is it?\nyes", "rejected": "Is it?\nyes, very"},
        {"prompt": "Is it?\n", "chosen": "yes", "rejected": "yes, very"},
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
    (
        "sharegpt",
        {"conversations": [{"from": "human", "content": "p"}, {"from": "gpt", "content": "a", "value": None}]},
        {"messages": [user("p"), assistant("a")]},
    ),
    (
        "sharegpt",
        {"conversations": [user("p"), assistant("a")], "system": "Be brief"},
        {"messages": [system("Be brief"), user("p"), assistant("a")]},
    ),
    (
        "sharegpt_pair",  # as LLaMA-Factory has it
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": [{"from": "gpt", "value": "b"}],
        },
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "sharegpt_feedback",
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}], "kto_tag": "false"},
        {"prompt": [user("p")], "completion": [assistant("a")], "label": False},
    ),
    (
        "instruction_feedback",
        {"instruction": "Do", "output": "Done", "label": "good"},
        {"prompt": [user("Do")], "completion": [assistant("Done")], "label": True},
    ),
    (
        "weighed_messages",
        {"messages": [user("p"), assistant("no") | {"weight": 0}, user("q"), assistant("a") | {"weight": 1}]},
        {"prompt": [user("p"), assistant("no"), user("q")], "completion": [assistant("a")]},
    ),
    (
        "weighed_messages",
        {
            "conversations": [
                {"from": "human", "value": "p", "train": False},
                {"from": "gpt", "value": "a", "train": True},
            ]
        },
        {"prompt": [user("p")], "completion": [assistant("a")]},
    ),
    (
        "scored",
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2.5]},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ),
    (
        "scored",
        {"instruction": "p", "completions": [{"response": "a", "rank": 1}, {"response": "b", "rank": 2}]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "scored",  # as in Nectar
        {"prompt": "p", "answers": [{"answer": "a", "rank": 2.0, "model": "m"}, {"answer": "b", "rank": 1.0}]},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ),
    (
        "scored",
        {"prompt": "p", "completions": [[assistant("a")], [assistant("b")]], "scores": [2, 1]},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "preference",  # the completions go on from the prompt, in several turns
        {
            "prompt": [user("p")],
            "chosen": [assistant("which?"), user("q"), assistant("a")],
            "rejected": [assistant("which?"), user("q"), assistant("b")],
        },
        {
            "prompt": [user("p"), assistant("which?"), user("q")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
    ),
    (
        "preference",
        {"system": "", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ),
    (
        "instruction_pair",
        {"system": "Be brief", "history": [["p", 0]], "instruction": "q", "chosen": "a", "rejected": "b"},
        {
            "prompt": [system("Be brief"), user("p"), assistant("0"), user("q")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
    ),
    (
        "instruction",
        {"instruction": "Is it so?", "input": 0, "output": False},
        {"prompt": [user("Is it so?\n\n0")], "completion": [assistant("false")]},
    ),
    (
        "prompt_completion",
        {"prompt": "p", "completion": [system("s"), user("p"), assistant("c")]},
        {"prompt": [system("s"), user("p")], "completion": [assistant("c")]},
    ),
    ("prompt_completion", {"prompt": 3, "completion": 0}, {"prompt": "3", "completion": "0"}),
    ("prompt_completion", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    (
        "instruction",
        {"instruction": " Do\n", "input": " \n", "output": "Done"},
        {"prompt": [user("Do")], "completion": [assistant("Done")]},
    ),
    (
        "instruction",
        {"instruction": "Do", "input": "\n    return\n", "output": "Done"},
        {"prompt": [user("Do\n\n    return")], "completion": [assistant("Done")]},
    ),
    (
        "tree",
        {
            "prompt": prompter(
                "p",
                reply("a", 0) | {"replies": [prompter("q", reply("b", None), reply("c", None))]},
                reply("d", 1),
                reply("e", 2) | {"deleted": True},
            )
        },
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("d")]},
    ),
    (
        "best_of_tree",
        {"prompt": prompter("p", reply("d", 1), reply("a", 0) | {"replies": [prompter("q")]})},
        {"messages": [user("p"), assistant("a")]},
    ),
    (
        "voted",  # as in PandaLM's test set
        {
            "instruction": "p",
            "input": "",
            "response1": "a",
            "response2": "b",
            "annotator1": 2,
            "annotator2": "2",
            "annotator3": 0,
        },
        {"prompt": [user("p")], "chosen": [assistant("b")], "rejected": [assistant("a")]},
    ),
    (
        "voted",
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": ["model_a", "tie", "A", None]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        "voted",
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ),
    (
        "voted",  # cells of a table
        {"prompt": "p", "response1": "a", "response2": "b", "annotator1": "1.0", "annotator2": "1.0"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        "arena",  # as in LMSYS's conversations with two models
        {
            "conversation_a": [user("p"), assistant("a")],
            "conversation_b": [user("p"), assistant("b")],
            "winner": "model_b",
        },
        {"prompt": [user("p")], "chosen": [assistant("b")], "rejected": [assistant("a")]},
    ),
    (
        "exchanges",  # as in Capybara
        {"source": "x", "conversation": [{"input": "p", "output": "a"}, {"input": "q", "output": "b"}]},
        {"messages": [user("p"), assistant("a"), user("q"), assistant("b")]},
    ),
    (
        "text_pair",
        {"id": "r1", "chosen": "Tell me: yes", "rejected": "Tell me: no"},
        {"prompt": "Tell me:", "chosen": " yes", "rejected": " no"},
    ),
    (
        "steps",  # TRL's stepwise supervision
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "p", "completion": "\na\nb", "label": False},
    ),
    (
        "steps",
        {"prompt": [user("p")], "completions": ["a", "b"], "labels": ["+", "+"]},
        {"prompt": [user("p")], "completion": [assistant("a\nb")], "label": True},
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
    assert row_format.rows(row) == [expected]


def test_every_format_is_tested():
    assert {name for name, _, _ in CONVERTED} == set(FORMATS)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "called"),
    [
        ({"messages": [user("p"), {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]}]}, CALL | {"id": "c1"}),
        (
            {"messages": [user("p"), {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]}]},
            CALL,
        ),
        (
            {"messages": [user("p"), {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}]},
            CALL,
        ),
        (
            {"conversations": [{"from": "human", "value": "p"},
                               {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
            CALL,
        ),
    ],
    ids=["OpenAI", "without a wrapper", "OpenAI's former", "ShareGPT"],
)  # fmt: skip
@pytest.mark.parametrize("tools", [{"tools": [TOOL]}, {"tools": '[{"name": "f", "parameters": {}}]'},
                                   {"functions": [TOOL["function"]]}])  # fmt: skip
def test_tools_and_calls_have_one_form(row, called, tools):
    row = row | tools
    expected = {"messages": [user("p"), assistant("") | {"tool_calls": [called]}], "tools": [TOOL]}
    assert detect_format([row], "demonstrations").rows(row) == [expected]


def test_what_tools_say_and_names_are_kept():
    said = {"role": "function", "name": "f", "content": "3"}
    row = {"messages": [user("p") | {"name": "Ada"}, said, assistant("a") | {"thinking": "hm", "images": []}]}
    thought = assistant("a") | {"reasoning_content": "hm", "thinking": "hm"}
    expected = [user("p") | {"name": "Ada"}, {"role": "tool", "name": "f", "content": "3"}, thought]
    assert FORMATS["messages"].rows(row) == [{"messages": expected}]
    turns = [{"from": "human", "value": "p"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "a"}]
    assert FORMATS["sharegpt"].rows({"conversations": turns})[0]["messages"][1] == {"role": "tool", "content": "3"}


def test_answers_that_think_otherwise_differ():
    pair = {"prompt": [user("p")], "chosen": [assistant("a") | {"thinking": "b"}], "rejected": [assistant("a")]}
    assert FORMATS["preference"].rows(pair)[0]["chosen"][0]["thinking"] == "b"


def test_completions_are_drawn_without_tools():
    with pytest.raises(BadRow, match="`tools`: completions are drawn to prompts without tools"):
        FORMATS["prompt"].rows({"prompt": "p", "tools": [TOOL]})


def test_roles_have_the_names_that_templates_know():
    said = [("System", "s"), ("human", "p"), ("GPT", "a"), ("User", "q"), ("model", "b")]
    expected = {"messages": [system("s"), user("p"), assistant("a"), user("q"), assistant("b")]}
    assert FORMATS["messages"].rows({"messages": [{"role": r, "content": text} for r, text in said]}) == [expected]
    assert FORMATS["sharegpt"].rows({"conversations": [{"from": r, "value": text} for r, text in said]}) == [expected]


def test_parts_of_a_message_are_joined():
    said = {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
    assert FORMATS["messages"].convert({"messages": [user("p"), said]})["messages"][1] == assistant("Hello")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": [{"type": "image", "url": "x"}]}, "parts that are not text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}, "a call of a tool has no name"),
        ({"role": "assistant", "content": "", "tool_calls": {"name": "f"}}, "`tool_calls` must be a list"),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "[1]"}},
            "arguments of a call are no object",
        ),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{1"}}, "arguments .* text, and no JSON"),
        (assistant("a") | {"reasoning_content": ["hm"]}, "`reasoning_content` of a message is a list, not text"),
        (assistant("a") | {"images": ["x.png"]}, "parts that are not text .`images`"),
        (assistant("a") | {"weight": 0}, "a weight of 0"),
        (assistant("a") | {"weight": 0.5}, "the weight `0.5`; only 0 and 1"),
        ({"role": "assistant", "content": {"a": 1}}, "is an object, not text"),
        ({"role": "assistant", "reasoning_content": "hm"}, "has no content"),
        ({"role": "assistant", "text": "hello"}, "has no content"),
    ],
)
def test_what_cannot_be_used_is_a_bad_row(message, reason):
    with pytest.raises(BadRow, match=reason):
        FORMATS["messages"].convert({"messages": [user("p"), message, assistant("a")]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": HH + "a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "do not share a prompt"),
        ({"chosen": "Yes it is", "rejected": "No"}, "there is no prompt"),
        ({"chosen": HH + "a", "rejected": HH}, "the rejected completion is empty"),
        ({"chosen": HH + " ", "rejected": HH + "b"}, "the chosen completion is empty"),
        ({"chosen": HH + "a", "rejected": HH + "a"}, "are the same"),
        ({"chosen": HH + "a\n\nHuman: bye", "rejected": HH + "b"}, "does not end with the assistant"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "the chosen completion is empty"),
        ({"prompt": [3], "chosen": "a", "rejected": "b"}, "`prompt` is a list, not text"),
        ({"prompt": "p", "chosen": float("nan"), "rejected": "b"}, "`chosen` is float, not text"),
        ({"prompt": "p", "chosen": [assistant("a")], "rejected": "b"}, "must all be text, or all be messages"),
        (
            {"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "does not begin with `prompt`",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "have no prompt"),
        ({"conversations": [user("p")], "chosen": [], "rejected": "b"}, "a completion is a list, not text"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "2 completions have 1 scores"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, "no completion is better"),
        ({"prompt": "p", "completions": ["a", ""], "scores": [1, 2]}, "no completion is better"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 10**400]}, "a score is not a number"),
        (
            {"prompt": "p", "completions": [{"text": "a", "score": 9, "rating": 1}, {"text": "b", "overall_score": 2}]},
            "no completion is better",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"parameters": {}}]}, "a function without a name"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": 7}, "`tools` must be a list of functions"),
        ({"chosen": HH + "a", "rejected": HH + "b", "tools": [{"name": "f"}]}, "`tools` goes before"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "`images` is not supported"),
        ({"chosen": HH + "a", "rejected": HH + "b", "system": "Be brief"}, "`system` goes before"),
        ({"instruction": " ", "chosen": "a", "rejected": "b"}, "the instruction is empty"),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "do not share a prompt",
        ),
    ],
)
def test_bad_preference_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        detect_format([row], "preferences").rows(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("p")]}, "does not end with an answer"),
        ({"conversations": [{"from": "martian", "value": "p"}]}, "unknown speaker `martian`"),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "said": "a"}]}, "has no content"),
        ({"conversations": [{"role": "user", "value": "p"}]}, "has no content"),
        ({"prompt": "p", "completion": " "}, "the completion is empty"),
        ({"prompt": "p", "completion": [user("q"), assistant("a")]}, "does not begin with `prompt`"),
        ({"text": " "}, "the text is empty"),
    ],
)
def test_bad_demonstration_rows(row, reason):
    with pytest.raises(BadRow, match=reason):
        detect_format([row], "demonstrations").rows(row)


def test_a_named_format_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="holds demonstrations, but preferences are needed"):
        detect_format([{"text": "x"}], "preferences", "text")


def test_answers_without_their_prompt_are_no_pair():
    with pytest.raises(ValueError, match="are no preferences"):
        detect_format([{"question": "q", "chosen": "I see a", "rejected": "I see b"}], "preferences")


def test_what_columns_may_be_is_guessed_and_formats_are_named_shortly():
    guessed = {
        "demonstrations": ({"question": "q", "Answer": "a", "id": 1}, "{prompt: question, completion: Answer}"),
        "preferences": ({"prompt": "q", "good": "a", "bad": "b"}, "{chosen: good, rejected: bad}"),
        "prompts": ({"query": "q"}, "{prompt: query}"),
    }
    for kind, (row, columns) in guessed.items():
        with pytest.raises(ValueError, match="are no ") as refused:
            detect_format([row], kind)
        assert f"Perhaps `data.columns={columns}`." in str(refused.value)
        assert len(str(refused.value)) < 500
    with pytest.raises(ValueError, match="are no ") as refused:
        detect_format([{"question": "q", "note": "a"}], "demonstrations")
    assert "Perhaps" not in str(refused.value)


def test_messages_written_as_text_are_refused():
    row = {"prompt": "[{'role': 'user', 'content': 'p'}]", "chosen": "[{'role': 'assistant'", "rejected": "x"}
    with pytest.raises(ValueError, match="messages are written as text"):
        detect_format([row], "preferences")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"messages": [user("p"), assistant("a")]},
        {"conversations": [user("p"), assistant("a")]},
        {"instruction": "p", "output": "a"},
    ],
)
@pytest.mark.parametrize("said", [{"label": False}, {"kto_tag": "bad"}, {"thumbs": "\N{THUMBS DOWN SIGN}\U0001f3fd"}])
def test_judged_answers_are_no_demonstrations(row, said):
    found = detect_format([row | {"label": "sports"}], "demonstrations")
    with pytest.raises(ValueError, match="are no demonstrations"):
        detect_format([row | said], "demonstrations")
    with pytest.raises(BadRow, match="says whether the answer is wanted"):
        found.rows(row | said)
    assert detect_format([row | said], "feedback").rows(row | said)[0]["label"] is False


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, True), (1, True), (1.0, True), ("1.0", True), (" Good", True), ("thumbs up", True), ("+1", True),
        ("\N{THUMBS UP SIGN}", True), (-1, False), ("-1.0", False), ("False", False), ("rejected", False),
        ("Thumbs-Down", False), ("incorrect", False), ("pos", True), ("downvote", False),
        (2, None), (0.5, None), ("meh", None), ([], None),
    ],
)  # fmt: skip
def test_what_labels_mean(value, wanted):
    row = {"prompt": "p", "completion": "c", "label": value}
    if wanted is None:
        with pytest.raises(BadRow, match="`label` must be true or false"):
            FORMATS["feedback"].rows(row)
    else:
        assert FORMATS["feedback"].rows(row)[0]["label"] is wanted


def test_the_label_that_says_something_is_read():
    row = {"prompt": "p", "completion": "c", "label": "sports", "desirable": False}
    assert detect_format([row], "feedback").rows(row)[0]["label"] is False
    with pytest.raises(ValueError, match="are no demonstrations.* `desirable` is `False`, which says whether"):
        detect_format([row], "demonstrations")


def test_a_label_that_says_nothing_is_named():
    with pytest.raises(ValueError, match="`label` is `meh`, which says neither"):
        detect_format([{"prompt": "p", "completion": "c", "label": "meh"}], "feedback")


def test_all_pairs_of_a_prompt_those_furthest_apart_first():
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 3, 3, 9]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in FORMATS["scored"].rows(row)]
    assert pairs == [("d", "a"), ("d", "b"), ("d", "c"), ("b", "a"), ("c", "a")]


def test_completions_are_compared_by_a_score_that_all_have_and_empty_ones_are_left_out():
    said = [("a", {"score": 9, "rating": 1}), ("b", {"score": None, "rating": 2}), (" ", {"score": 1, "rating": 3})]
    row = {"prompt": "p", "completions": [{"text": text} | scores for text, scores in said]}
    assert FORMATS["scored"].rows(row) == [{"prompt": "p", "chosen": "b", "rejected": "a"}]


def test_a_completion_without_a_score_is_left_out_alone():
    said = [("a", 2), ("b", None), ("c", "N/A"), ("d", float("nan")), ("e", "3")]
    row = {"prompt": "p", "completions": [{"text": text, "score": score} for text, score in said]}
    assert FORMATS["scored"].rows(row) == [{"prompt": "p", "chosen": "e", "rejected": "a"}]
    row = {"prompt": "p", "completions": [text for text, _ in said], "scores": [score for _, score in said]}
    assert FORMATS["scored"].rows(row) == [{"prompt": "p", "chosen": "e", "rejected": "a"}]


def test_a_format_that_is_named_is_taken_where_it_can_be():
    row = {"note": "a b", "chosen": "Tell me: yes", "rejected": "Tell me: no"}
    with pytest.raises(ValueError, match="are no preferences"):
        detect_format([row], "preferences")
    assert detect_format([row], "preferences", "text_pair").rows(row)[0]["prompt"] == "Tell me:"
    row = {"messages": [user("p"), assistant("a"), user("q"), assistant("b")]}
    answers = detect_format([row], "demonstrations", "weighed_messages").rows(row)
    assert [one["completion"] for one in answers] == [[assistant("a")], [assistant("b")]]


def test_weights_are_looked_for_in_all_rows():
    plain, weighed = (
        {"messages": [user("p"), assistant("a")]},
        {"messages": [user("p"), assistant("a") | {"weight": 0}]},
    )
    assert detect_format([plain, weighed], "demonstrations").name == "weighed_messages"
    with pytest.raises(BadRow, match="`weighed_messages` leave out"):
        detect_format([plain], "demonstrations").rows(weighed)


def test_the_chosen_side_is_imitated_where_that_is_asked_for():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="`data.use=chosen`"):
        detect_format([row], "demonstrations")
    found = detect_format([row], "demonstrations", use="chosen")
    assert (found.name, found.kind) == ("preference", "demonstrations")
    assert found.rows(row) == [{"prompt": "p", "completion": "a"}]
    with pytest.raises(ValueError, match="are no preferences"):
        detect_format([{"prompt": "p", "completion": "a"}], "demonstrations", use="chosen")


@pytest.mark.parametrize("said", ['[{"from": "Paris", "to": "Rome"}]', '[{"value": 3, "from": "Paris"}]'])
def test_answers_that_are_json_are_answers(said):
    row = {"prompt": "p", "completion": said}
    assert detect_format([row], "demonstrations").rows(row) == [row]


def test_a_transcript_round_trips():
    row = {"chosen": HH + "Good", "rejected": HH + "Bad"}
    converted = FORMATS["hh_rlhf"].convert(row)
    assert FORMATS["hh_rlhf"].as_text(converted["prompt"]) == HH.rstrip()


def test_all_ranked_replies_of_a_tree_are_compared():
    asked_again = prompter("q", reply("d", 1), reply("c", 0))
    tree = {"prompt": prompter("p", reply("a", 0) | {"replies": [asked_again]}, reply("x", None), reply("b", 1))}
    pairs = FORMATS["tree"].rows(tree)
    assert [(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in pairs] == [("a", "b"), ("c", "d")]
    assert pairs[1]["prompt"] == [user("p"), assistant("a"), user("q")]


def test_ranks_may_be_cells_of_a_table_and_not_there():
    replies = [reply("b", "2.0"), reply("x", float("nan")), reply("d", "3.0") | {"deleted": "True"}, reply("a", "1")]
    row = {"prompt": prompter("p", *(one | {"deleted": one.get("deleted", "False")} for one in replies))}
    (pair,) = FORMATS["tree"].rows(row)
    assert (pair["chosen"], pair["rejected"]) == ([assistant("a")], [assistant("b")])
    assert FORMATS["best_of_tree"].rows(row) == [{"messages": [user("p"), assistant("a")]}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": prompter("p", reply("a", None), reply("b", None))},
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": [1, 2]},
        {"prompt": "p", "response_a": "a", "response_b": "b", "votes": [0, 0, 1]},
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]},
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"},
        {"conversation_a": [user("p"), assistant("a")], "conversation_b": [user("p")], "winner": "tie"},
    ],
)
def test_ties_are_no_bad_rows(row):
    with pytest.raises(Tie):
        detect_format([row], "preferences").rows(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": [1, 7]}, "a vote is `7`, and has to be 1 or 2"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "votes": [True]}, "a vote is `True`"),
        ({"prompt": {"role": "prompter", "replies": [1]}}, "a reply is no message"),
        ({"prompt": prompter("p", reply("a", "best"))}, "the rank of a reply is `best`"),
    ],
)
def test_bad_votes_and_trees(row, reason):
    with pytest.raises(BadRow, match=reason):
        detect_format([row], "preferences").rows(row)


def test_steps_are_for_labelled_completions_alone():
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    for kind in ("demonstrations", "preferences"):
        with pytest.raises(ValueError, match="would do as feedback .*, for the method .*`kto`"):
            detect_format([row], kind)
    with pytest.raises(BadRow, match="2 steps have 1 labels"):
        FORMATS["steps"].rows(row | {"labels": [True]})
