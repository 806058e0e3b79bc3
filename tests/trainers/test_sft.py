"""SFT: what is trained on, packed or not, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.files import read
from support.in_process import run_stages
from transformers import AutoTokenizer

from alignctl.data.rendering import Reader, check_rows
from alignctl.errors import RequestError
from alignctl.models.tokenizer import CHAT_TEMPLATE

pytestmark = pytest.mark.train

TALK = [
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 4 more?"},
    {"role": "assistant", "content": "Of course! It is 9."},
]


def labels_text(small, trainer, row=0) -> str:
    return small.tokenizer.decode([label for label in trainer.train_dataset[row]["labels"] if label != -100])


def dataset(*rows):
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def test_completion_only(small):
    rows = dataset({"prompt": TALK[:1], "completion": TALK[1:2]})
    assert labels_text(small, small.trainer("sft", rows=rows)) == "It is 5.<|end|>"


def test_assistant_only_trains_every_answer_and_no_question(small):
    trainer = small.trainer("sft", rows=dataset({"messages": TALK}), assistant_only_loss=True)
    assert labels_text(small, trainer) == "It is 5.<|end|>Of course! It is 9.<|end|>"


def test_without_either_everything_is_trained(small):
    text = labels_text(small, small.trainer("sft", rows=dataset({"messages": TALK})))
    assert text.startswith("<|user|>What is 2")
    assert text.endswith("9.<|end|>")


def test_packed_rows_do_not_see_each_other(small):
    """The loss of a packed row is that of its rows by themselves."""
    rows = dataset(*({"prompt": TALK[:i], "completion": TALK[i : i + 1]} for i in (1, 3)))
    alone = [one_loss(small.trainer("sft", rows=rows.select([i]))) for i in (0, 1)]
    packed = small.trainer("sft", rows=rows, packing=True, max_length=100)
    assert len(packed.train_dataset) == 1
    loss, tokens = one_loss(packed)
    assert tokens == alone[0][1] + alone[1][1]
    assert loss * tokens == pytest.approx(sum(loss * tokens for loss, tokens in alone), rel=1e-5)


def one_loss(trainer) -> tuple[float, int]:
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(batch))), int((batch["labels"] != -100).sum())


REFUSES_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    + CHAT_TEMPLATE
)
NO_END = CHAT_TEMPLATE.replace("message.content + '<|end|>'", "message.content", 1)


def test_answers_without_an_end_are_refused(small):
    small.tokenizer.chat_template = NO_END
    for method in ("sft", "orpo"):
        with pytest.raises(RequestError, match="would never learn to stop") as refused:
            small.trainer(method)
        assert "`<|end|>`" in refused.value.problems[0].message
        assert "model.eos_token" in refused.value.problems[0].hint


def test_an_end_outside_the_assistant_s_marks_is_refused(small):
    small.tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message.content + '<|end|>' }}{% endgeneration %}",
        "{{ message.content }}{% endgeneration %}{{ '<|end|>' }}",
    )
    with pytest.raises(RequestError, match="would never learn to stop"):
        small.trainer("sft", rows=dataset({"messages": TALK}), assistant_only_loss=True)


def test_a_template_that_loses_text_is_refused(small):
    check_rows(Reader(small.tokenizer), [{"messages": TALK}])
    small.tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|user|>' + message.content", "'<|user|>'")
    with pytest.raises(RequestError, match="row 1: the chat template leaves out what the user says: 'What is 2 plus 3"):
        check_rows(Reader(small.tokenizer), [{"messages": TALK}])


def test_rows_that_a_template_refuses_are_left_out(tmp_path, small):
    """However far down they stand: TRL would end in the middle of tokenising."""
    small.tokenizer.chat_template = REFUSES_SYSTEM
    rows = [{"messages": TALK}] * 150 + [{"messages": [{"role": "system", "content": "Be brief."}, *TALK]}]
    left_out, _ = check_rows(Reader(small.tokenizer), rows)
    assert left_out == {150: "System role not supported (without its system message the template takes it)"}
    small.tokenizer.save_pretrained(tmp_path / "model")
    small.model.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        "recipe=sft_local", f"model.path={tmp_path / 'model'}", f"data.path={file}", "data.eval_rows=0",
        "eval.prompts=0", "sft.max_steps=1", "sft.max_length=100",
    )  # fmt: skip
    run = run_stages(tmp_path / "run", *arguments)
    _, notice, *_ = read(run / "sft" / "progress.json")["notices"]  # the first says the format of the rows
    assert notice.startswith("1 of 151 rows cannot be written: row 151: System role not supported")
    ledger = read(run / "sft" / "data.json")["train"]
    assert (ledger["kept"], list(ledger["skipped"])) == (150, ["151"])
    with pytest.raises(RequestError, match="1 of 151 rows cannot be written"):
        run_stages(tmp_path / "strict", *arguments, "data.on_bad_row=fail")


def test_prompts_alone_are_written_too(small):
    small.tokenizer.chat_template = REFUSES_SYSTEM
    rows = [{"prompt": TALK[:1]}, {"prompt": [{"role": "system", "content": "Be brief."}, *TALK[:1]]}]
    left_out, notices = check_rows(Reader(small.tokenizer), rows)
    assert (list(left_out), notices) == ([1], [])


def test_a_prompt_that_is_written_otherwise_is_told(small):
    assert check_rows(Reader(small.tokenizer), [{"prompt": TALK[:1], "completion": TALK[1:2]}]) == ({}, [])
    small.tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{%- if add_generation_prompt -%}", "{%- if add_generation_prompt -%}<think></think>"
    )
    _, (notice,) = check_rows(Reader(small.tokenizer), [{"prompt": TALK[:1], "completion": TALK[1:2]}])
    assert "otherwise" in notice


def test_conversations_need_a_template(tmp_path, shared_data):
    model = shared_data / "models" / "stories260K"
    rows = shared_data / "sft" / "oasst_en100" / "best_train.jsonl"
    with pytest.raises(RequestError, match="no chat template") as refused:
        run_stages(tmp_path, "recipe=sft_local", f"model.path={model}", f"data.path={rows}")
    assert "model.chat_template=FILE" in refused.value.problems[0].hint


def test_with_a_template_of_the_user_s_conversations_train(tmp_path, shared_data):
    model = shared_data / "models" / "stories260K"
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run = run_stages(
        tmp_path / "run", "recipe=sft_local", f"model.path={model}", "eval.prompts=4", "eval.max_new_tokens=8",
        f"data.path={shared_data / 'sft' / 'oasst_en100' / 'best_train.jsonl'}", f"model.chat_template={template}",
        "data.limit=24", "data.max_lost=0.5", "sft.max_steps=1",
    )  # fmt: skip
    assert AutoTokenizer.from_pretrained(run / "sft" / "model").chat_template == template.read_text()


def test_lost_completions_are_counted_and_refused_above_a_share(tmp_path):
    short = {"prompt": "Hello there.", "completion": " Good day."}
    long = {"prompt": "Once upon a time. " * 60, "completion": " The end."}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [short] * 18 + [long] * 2))
    more = (
        "recipe=sft_quickstart", f"data.path={file}", "data.eval_rows=0", "eval.judge=null", "eval.prompts=0",
        "sft.max_steps=1", "model.scratch.vocab_size=300", "sft.max_length=64",
    )  # fmt: skip
    with pytest.raises(RequestError, match=r"2 of 20 training rows \(10 %\) are lost") as refused:
        run_stages(tmp_path / "refused", *more)
    assert "`data.max_lost=0.1` accepts it" in refused.value.problems[0].hint
    run = run_stages(tmp_path / "accepted", *more, "data.max_lost=0.1")
    assert read(run / "sft" / "data.json")["train"]["lost"] == 2


@pytest.mark.parametrize("packing", ["false", "true"])
def test_nothing_left_of_any_row_is_refused_whatever_is_allowed(tmp_path, packing):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Once upon a time. " * 60, "completion": " The end."}) + "\n")
    with pytest.raises(RequestError, match=r"1 of 1 training rows \(100 %\) are lost") as refused:
        run_stages(
            tmp_path / "run", "recipe=sft_quickstart", f"data.path={file}", "data.eval_rows=0", "eval.judge=null",
            "eval.prompts=0", "model.scratch.vocab_size=300", "sft.max_length=64", "data.max_lost=1",
            f"sft.packing={packing}",
        )  # fmt: skip
    assert "accepts it" not in refused.value.problems[0].hint


@pytest.mark.parametrize("precompute", ["false", "true"])
def test_the_same_for_pairs_and_for_held_out_rows(tmp_path, precompute):
    long = {"prompt": "Once upon a time. " * 60, "chosen": " The end.", "rejected": " No end."}
    short = {"prompt": "Once.", "chosen": " The end.", "rejected": " No end."}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("long", "short")}
    for name, row in (("long", long), ("short", short)):
        files[name].write_text(json.dumps(row) + "\n" + json.dumps(row | {"chosen": " Well."}) + "\n")
    common = (
        "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", "eval.judge=null", "eval.prompts=0",
        "model.scratch.vocab_size=300", "dpo.max_length=64", "dpo.max_steps=1",
        f"dpo.precompute_ref_log_probs={precompute}",
    )  # fmt: skip
    with pytest.raises(RequestError, match=r"2 of 2 training rows \(100 %\) are lost"):
        run_stages(tmp_path / "train", *common, f"data.path={files['long']}", "data.eval_rows=0")
    run = run_stages(tmp_path / "eval", *common, f"data.path={files['short']}", f"data.eval_path={files['long']}")
    assert read(run / "dpo" / "result.json")["after"] == {}
    assert read(run / "dpo" / "data.json")["eval"]["lost"] == 2


def test_assistant_only_needs_a_template_that_marks_the_assistant(small):
    small.tokenizer.chat_template = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(RequestError, match="needs a chat template that marks") as refused:
        small.trainer("sft", rows=dataset({"messages": TALK}), assistant_only_loss=True)
    assert "{% endgeneration %}" in refused.value.problems[0].hint


def test_documents_need_no_end(tmp_path):
    """Continued pretraining: text that is cut before its end is nobody's answer."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} Once upon a time. " * 40}) + "\n" for i in range(4)))
    for packing in ("false", "true"):
        run_stages(
            tmp_path / packing, "recipe=sft_quickstart", f"data.path={file}", "data.eval_rows=0", "eval.judge=null",
            "eval.prompts=0", "model.scratch.vocab_size=300", "sft.max_length=32", "sft.max_steps=1",
            f"sft.packing={packing}",
        )  # fmt: skip
