"""What is wrong with how rows are written is seen before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignctl.data.encoding import Encoder
from alignctl.data.rendering import CHECKS, Reader, check_has_end, check_rows
from alignctl.data.templates import read_template
from alignctl.data.tokenizing import tokenize_completions, tokenize_prompt
from alignctl.errors import RequestError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
ASKED = {"role": "user", "content": "Add one to 0."}
SAID = {"role": "assistant", "content": "That is 1."}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {}}}


def made(template: str | None = None, post: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `post` is what it makes of every text: `<s> $A` for example."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    texts = ["Add one to 0. That is 1. yes no"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    )
    if post:
        ids = [(token, bpe.token_to_id(token)) for token in tokens[:2]]
        bpe.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template and read_template(template), **special)


def look(tokenizer, *rows, **options):
    return check_rows(Reader(tokenizer, **options), rows)


def refusal(tokenizer, row) -> str:
    with pytest.raises(RequestError) as refused:
        look(tokenizer, {"messages": [ASKED, SAID]}, row)
    (problem,) = refused.value.problems
    assert "row 2: " in problem.message
    assert problem.hint
    return problem.message


CHATML = made("chatml")
R1 = (  # as DeepSeek-R1's own template does: what stands before </think> is cut
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_ordinary_rows_are_fine():
    pair = {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID | {"content": "2"}]}
    assert look(CHATML, {"messages": [ASKED, SAID]}, pair, {"prompt": [ASKED]}) == ({}, [])
    text = {"prompt": "Add one to 0.", "completion": " That is 1."}
    assert look(made(), text, {"text": "<s>Add one to 0.</s>"}, {"prompt": "Add one"}) == ({}, [])


@pytest.mark.parametrize(
    "said",
    [{"content": "<think>\nAdd one to 0\n</think>\n\n1"}, {"content": "1", "reasoning_content": "Add one to 0"}],
    ids=["in the text", "beside it"],
)
def test_thoughts_of_the_answer_are_not_lost(said):
    tokenizer = made(R1)
    thought = {"role": "assistant"} | said
    asked = {"role": "user", "content": "What is 0 + 1?"}
    assert "thoughts (reasoning) of the answer" in refusal(tokenizer, {"messages": [asked, thought]})
    _, (notice,) = look(tokenizer, {"messages": [asked, thought, asked, SAID]})
    assert notice.startswith("row 1: the chat template leaves out the thoughts (reasoning) of earlier turns; ")
    assert look(made("qwen3"), {"messages": [asked, thought]}) == ({}, [])


def test_what_somebody_says_is_looked_for_in_all_rows():
    tokenizer = made("{% for m in messages if m.role != 'narrator' %}{{ m.role + ': ' + m.content }}\n{% endfor %}")
    rows = [{"messages": [ASKED, SAID]}] * 100 + [
        {"messages": [ASKED, {"role": "narrator", "content": "A pause."}, SAID]}
    ]
    with pytest.raises(RequestError, match="row 101: the chat template leaves out what the narrator says"):
        look(tokenizer, *rows)


def test_tools_are_not_lost():
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "leaves out tools: `get_weather`" in refusal(CHATML, {"messages": [ASKED, SAID], "tools": [TOOL]})
    assert "leaves out a call of the tool `get_weather`" in refusal(CHATML, {"messages": [ASKED, calls, ASKED, SAID]})
    assert look(made("qwen3"), {"messages": [ASKED, SAID], "tools": [TOOL]}) == ({}, [])
    named_alike = {"messages": [ASKED | {"content": "What is get_weather?"}, SAID], "tools": [TOOL]}
    assert "leaves out tools" in refusal(CHATML, named_alike)
    said = {"role": "tool", "tool_call_id": "abcdefghi", "content": 'It is "warm"\nthere.'}
    whole = {"messages": [ASKED, calls, said, SAID], "tools": [TOOL]}
    assert look(made("mistral"), whole)[0] == {}


def test_calls_are_looked_for_where_they_are_made():
    """The list of tools has the name of what is called, and a template may write the name alone."""
    arguments = {"city": 'the "Ö"', "days": [3, True]}
    call = CALL | {"function": {"name": "get_weather", "arguments": arguments}}
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [TOOL]}
    listed = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    assert "a call of the tool `get_weather`: 'get_weather'" in refusal(made(listed + "{% endfor %}"), row)
    named = listed + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    assert "a call of the tool `get_weather`: 'city'" in refusal(made(named), row)
    for template in (
        named.replace("name }}", "name }}{{ c.function.arguments | tojson | tojson }}"),
        "qwen3",
        "mistral",
    ):
        assert look(made(template), row) == ({}, [])


def test_unknown_speakers_are_told():
    _, (notice,) = look(CHATML, {"messages": [ASKED, {"role": "narrator", "content": "A pause."}, SAID]})
    assert notice.startswith("row 1: a message has the role `narrator`")


def test_names_of_speakers_are_not_lost():
    row = {"messages": [ASKED | {"name": "Ada"}, SAID]}
    left_out, _ = look(CHATML, row, {"messages": [ASKED, SAID]})
    assert left_out == {0: "the chat template leaves out who speaks: `Ada`"}
    named = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}\n{% endfor %}"
    assert look(made(named), row)[0] == {}


def test_rows_that_cannot_be_written_are_left_out_with_the_reason():
    tokenizer = made("gemma")
    rude = {"role": "system", "content": "Be rude."}
    left_out, _ = look(
        tokenizer, {"messages": [ASKED, rude, SAID]}, {"messages": [ASKED, ASKED, SAID]}, {"messages": [ASKED, SAID]},
        {"prompt": [ASKED], "completion": [ASKED]},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID | {"content": "That is 1. "}]},
    )  # fmt: skip
    assert list(left_out) == [0, 1, 3, 4]
    assert "without its system message the template takes it" in left_out[0]
    assert "speak in turns" in left_out[1]
    assert "chosen and rejected are the same" in left_out[4]
    left_out, _ = look(CHATML, {"prompt": [ASKED], "completion": [SAID, ASKED]})
    assert "the last message is of the role `user`" in left_out[0]
    whole = made("{% if messages|length < 2 %}{{ raise_exception('say more') }}{% endif %}" + read_template("chatml"))
    row = {"prompt": [ASKED], "completion": [SAID]}
    assert look(whole, row).left_out == {0: "of the prompt alone: say more"}
    assert look(whole, {"messages": [ASKED, SAID]}).left_out == {}


def test_rows_of_which_a_template_marks_nothing():
    unmarked = {"messages": [ASKED, SAID | {"role": "model"}]}
    tokenizer = made("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("role == 'assistant'", "role == 'nobody'")
    left_out, _ = look(tokenizer, {"messages": [ASKED, SAID]}, assistant_only=True)
    assert "marks nothing of it as the assistant's" in left_out[0]
    assert look(CHATML, {"messages": [ASKED, SAID]}, assistant_only=True).left_out == {}
    assert look(tokenizer, {"messages": [ASKED, SAID]}).left_out == {}
    assert "the role `model`" in look(CHATML, unmarked).left_out[0]


def test_a_first_token_that_stands_twice():
    tokenizer = made(post="<s> $A")
    assert "begins with the token `<s>` twice" in refusal(tokenizer, {"text": "<s>That is 1."})
    chat = made("llama3")
    chat.chat_template = "{{ bos_token }}" + chat.chat_template
    with pytest.raises(RequestError, match="`<s>` twice"):
        look(chat, {"messages": [ASKED, SAID]})


def test_special_tokens_that_people_wrote_are_told_once():
    written = {"messages": [ASKED | {"content": "What does <|im_end|> mean?"}, SAID]}
    _, (notice,) = look(CHATML, {"messages": [ASKED, SAID]}, written, written)
    assert notice.startswith("row 2 and 1 more: the user has `<|im_end|>`, a special token")
    _, (notice,) = look(made(), {"prompt": "Add one</s> to 0.", "completion": " That is 1.</s>"})
    assert notice.startswith("row 1: the text has `</s>`, a special token")


def test_ordinary_tokens_that_people_wrote_are_told_where_the_template_writes_them():
    tokenizer = made("phi4")
    tokenizer.add_tokens(["<|im_sep|>", "one"])
    assert look(tokenizer, {"messages": [ASKED, SAID]}) == ({}, [])
    _, (notice,) = look(tokenizer, {"messages": [ASKED | {"content": "What does <|im_sep|> mean?"}, SAID]})
    assert "the user has `<|im_sep|>`" in notice


def test_texts_that_are_templated_already_are_told():
    _, (notice,) = look(made(), {"text": "<|im_start|>user\nAdd one.<|im_end|>\n<|im_start|>assistant\n1<|im_end|>"})
    assert notice.startswith("row 1: the text has `<|im_start|>`: it looks as if a chat template had written it")


def test_a_border_that_merges_is_told():
    row = {"prompt": "That is ", "chosen": "yes", "rejected": "no"}
    _, (notice,) = look(made(), row, row)
    assert notice.startswith("row 1 and 1 more of the first 100: the prompt's end 'That is ' merges with the answer")


def test_a_prompt_that_is_answered_already_is_told():
    _, (notice,) = look(CHATML, {"prompt": [ASKED, SAID], "completion": [SAID]})
    assert "the prompt ends with what the assistant says" in notice


def test_marks_without_a_token_are_told():
    _, (notice,) = look(made("phi4"), {"messages": [ASKED, SAID]})
    assert "no token for `<|im_sep|>`" in notice
    assert "model.add_tokens" in notice


def test_a_tokenizer_without_an_end_token_is_refused():
    check_has_end(CHATML)
    tokenizer = made()
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="no end token") as refused:
        check_has_end(tokenizer)
    assert "`model.eos_token=...`; its special tokens are `<s>`" in refused.value.problems[0].hint


def test_an_end_token_that_the_tokenizer_adds_stands_behind_answers_alone_and_once():
    tokenizer = made(post="<s> $A </s>")
    plain = made(post="<s> $A")
    assert tokenizer("Add")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenize_prompt(tokenizer, "Add one") == tokenize_prompt(plain, "Add one")
    answers = ("Add one to 0.", [" That is 1.", " yes</s>"])
    assert tokenize_completions(tokenizer, *answers) == tokenize_completions(plain, *answers)
    long = "Add one to 0. That is 1. yes no and so on and on, as long as it takes to be worth a cut between two words"
    groups = [["Add one", "Add one to 0.</s>"], [long, f"{long} yes</s>", f"{long} no</s>"]]
    assert Encoder(tokenizer, groups)(groups, special=True) == Encoder(plain, groups)(groups, special=True)


def test_the_page_has_every_check():
    page = DOCS.read_text(encoding="utf-8")
    for check in CHECKS:
        assert f"| {check.name} |" in page
