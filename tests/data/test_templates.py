"""The chat templates that come with alignctl write what the models' own do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from alignctl.data.templates import TEMPLATES, is_text, read_template, template_file

SYSTEM = {"role": "system", "content": " Be brief. "}
TALK = [
    {"role": "user", "content": "Hello "},
    {"role": "assistant", "content": "Hi there\n"},
    {"role": "user", "content": "Who are you?"},
]
ANSWER = {"role": "assistant", "content": "A model."}
THOUGHT = {"role": "assistant", "content": "<think>\nWho?\n</think>\n\nA model."}
REASONED = {"role": "assistant", "content": "A model.", "reasoning_content": "Who?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str, number: str = "abcdefghi") -> dict:
    return {"type": "function", "id": number, "function": {"name": "get_weather", "arguments": {"city": city}}}


CALLS = {"role": "assistant", "content": "", "tool_calls": [call("Paris"), call("Rome", "abcdefghj")]}
REPLIES = [
    {"role": "tool", "content": "12", "tool_call_id": "abcdefghi"},
    {"role": "tool", "content": "13", "tool_call_id": "abcdefghj"},
]


def render(text: str, messages: list, **options) -> str:
    (written,), _ = render_jinja_template([messages], chat_template=text, bos_token="<s>", eos_token="</s>", **options)
    return written


def as_models_do(name: str) -> str:
    """A template as it is published with the model, which TRL keeps to know models by."""
    trl = importlib.util.find_spec("trl").submodule_search_locations[0]
    return Path(trl, "chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
@pytest.mark.parametrize(
    "messages",
    [
        TALK,
        [*TALK, ANSWER],
        [TALK[0], THOUGHT, TALK[0], THOUGHT],
        [TALK[0], REASONED, TALK[0], REASONED],
        [TALK[0], THOUGHT, TALK[0]],
    ],
    ids=["asked", "answered", "thoughts", "reasoning", "thoughts asked"],
)
@pytest.mark.parametrize(("name", "published"), [("llama3", "llama3"), ("gemma", "gemma3"), ("qwen3", "qwen3")])
def test_as_published(name, published, messages, system):
    asked = messages[-1]["role"] == "user"
    ours, theirs = (
        render(text, system + messages, add_generation_prompt=asked)
        for text in (read_template(name), as_models_do(published))
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "end", [[], [ANSWER], [THOUGHT], [TALK[0], REASONED]], ids=["open", "plain", "thought", "more"]
)
@pytest.mark.parametrize("said", ["", "I look.", "<think>\nHm\n</think>\n\nI look."], ids=["calls", "says", "thinks"])
def test_tools_of_qwen3_as_published(said, end):
    messages = [SYSTEM, *TALK, CALLS | {"content": said}, *REPLIES, *end]
    ours, theirs = (
        render(text, messages, tools=[WEATHER], add_generation_prompt=not end)
        for text in (read_template("qwen3"), as_models_do("qwen3"))
    )
    assert ours == theirs
    assert "get_weather" in ours


def test_qwen3_asked_not_to_think_as_published():
    ours, theirs = (
        render(text, TALK, add_generation_prompt=True, enable_thinking=False)
        for text in (read_template("qwen3"), as_models_do("qwen3"))
    )
    assert ours == theirs


@pytest.mark.parametrize("answer", [THOUGHT, REASONED, ANSWER], ids=["thought", "reasoning", "none"])
def test_deepseek_r1_writes_what_the_model_is_asked_and_says(answer):
    """The published one asks with `<think>`, and leaves out the thoughts of all answers, also of the last."""
    before = [SYSTEM, TALK[0], THOUGHT, TALK[2]]
    asked = render(as_models_do("deepseek_r1_distill"), before, add_generation_prompt=True)
    assert render(read_template("deepseek-r1"), before, add_generation_prompt=True) == asked
    thoughts = "" if answer is ANSWER else "Who?"
    said = f"{thoughts}\n</think>\n\nA model.<｜end▁of▁sentence｜>"
    assert render(read_template("deepseek-r1"), [*before, answer]) == asked + said


BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
         {"role": "assistant", "content": "Hi there"}, {"role": "user", "content": "Who are you?"}]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        # openai-python 0.28, chatml.md; the same form of OpenHermes in llama.cpp, tests/test-chat-template.cpp
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
            "Hi there<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
            "A model.<|im_end|>\n",
        ),
        # the card of HuggingFaceH4/zephyr-7b-beta; get_conv_template("zephyr") of FastChat 0.2.36 prints this
        (
            "zephyr",
            "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n<|user|>\nWho are you?</s>\n"
            "<|assistant|>\n",
            "A model.</s>\n",
        ),
        # the template of microsoft/phi-4 as rendered in llama.cpp, tests/test-chat-template.cpp
        (
            "phi4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
            "<|im_start|>assistant<|im_sep|>Hi there<|im_end|><|im_start|>user<|im_sep|>Who are you?<|im_end|>"
            "<|im_start|>assistant<|im_sep|>",
            "A model.<|im_end|>",
        ),
        # get_conv_template("vicuna_v1.1") of FastChat 0.2.36 prints this, whose tokenizer puts <s> before it
        (
            "vicuna",
            "<s>Be brief. USER: Hello ASSISTANT: Hi there</s>USER: Who are you? ASSISTANT:",
            " A model.</s>",
        ),
        # one turn: stanford_alpaca, README and train.py; more of them: LLaMA-Factory's template alpaca
        (
            "alpaca",
            "<s>Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>\n\n### Instruction:\nWho are you?"
            "\n\n### Response:\n",
            "A model.</s>",
        ),
        # mistral-common 1.13.1, tokenizer version 3
        ("mistral", "<s>[INST] Hello[/INST] Hi there</s>[INST] Be brief.\n\nWho are you?[/INST]", " A model.</s>"),
    ],
)
def test_as_described(name, asked, said):
    text = read_template(name)
    assert render(text, BRIEF, add_generation_prompt=True) == asked
    assert render(text, [*BRIEF, ANSWER]) == asked + said


@pytest.mark.parametrize(
    ("name", "preamble"),
    [
        # of FastChat 0.2.36
        (
            "vicuna",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Hello",
        ),
        # of stanford_alpaca's README
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nHello",
        ),
    ],
)
def test_a_preamble_where_there_is_no_system(name, preamble):
    assert render(read_template(name), BRIEF[1:]).startswith(f"<s>{preamble}")


def test_tools_of_mistral():
    """mistral-common 1.13.1, tokenizer version 3, in its mode for fine-tuning."""
    messages = [
        *BRIEF[:3],
        {"role": "user", "content": "Weather in Paris?"},
        CALLS | {"tool_calls": [call("Paris")]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "12 degrees. "},
    ]
    written = (
        '<s>[INST] Hello[/INST] Hi there</s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": '
        '"get_weather", "description": "Current weather", "parameters": {"type": "object", "properties": {"city": '
        '{"type": "string"}}}}}][/AVAILABLE_TOOLS][INST] Be brief.\n\nWeather in Paris?[/INST][TOOL_CALLS] [{"name": '
        '"get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>[TOOL_RESULTS] {"content": "12 '
        'degrees", "call_id": "abcdefghi"}[/TOOL_RESULTS] 12 degrees.</s>'
    )
    assert render(read_template("mistral"), messages, tools=[WEATHER]) == written
    messages[5]["content"] = '{"degrees": 12}'
    assert '[TOOL_RESULTS] {"content": {"degrees": 12}, "call_id"' in render(read_template("mistral"), messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_marked_with_its_end(name):
    """So that assistant-only loss teaches the answer and to stop, and nothing that the model is asked with."""
    text = read_template(name)
    options = {"chat_template": text, "bos_token": "<s>", "eos_token": "</s>"}
    asked = render(text, BRIEF, add_generation_prompt=True)
    (written,), (marked,) = render_jinja_template(
        [[*BRIEF, ANSWER]], return_assistant_tokens_mask=True, **options
    )  # fmt: skip
    first, last = (written[start:end] for start, end in marked)
    end = TEMPLATES[name].end or "</s>"
    assert first.lstrip().startswith("Hi there")
    assert first.endswith(end)
    assert written.startswith(asked)
    assert marked[-1][0] == len(asked)
    assert last.endswith(f"A model.{end}")


def test_a_system_message_in_the_middle_is_written_or_refused():
    messages = [*BRIEF[1:3], {"role": "system", "content": "Be rude."}, BRIEF[3]]
    for name in ("chatml", "llama3", "phi4", "qwen3", "zephyr"):
        assert "Be rude." in render(read_template(name), messages)
    for name in ("alpaca", "deepseek-r1", "gemma", "mistral", "vicuna"):
        with pytest.raises(TemplateError, match="the system only before them"):
            render(read_template(name), messages)


def test_each_file_is_in_the_table_and_each_of_the_table_a_file():
    assert {template.file for template in TEMPLATES.values()} == set(TEMPLATES["chatml"].file.parent.iterdir())


def test_a_name_a_file_or_a_text(tmp_path, monkeypatch):
    (tmp_path / "chatml").write_text("mine {{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert read_template("chatml") == TEMPLATES["chatml"].file.read_text()
    assert read_template("./chatml") == "mine {{ messages }}"
    assert is_text("{{ messages }}")
    assert template_file("{{ messages }}") is None
    assert read_template("{{ messages }}") == "{{ messages }}"
