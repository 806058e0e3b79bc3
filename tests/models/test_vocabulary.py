"""Tokens and embeddings that do not fit: refused with both numbers, resized on request, added, and trained alone."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.files import read, write_rows
from support.in_process import run_stages
from support.rewards import REWARDS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignctl.config.schema import ModelSettings
from alignctl.errors import RequestError
from alignctl.models.loading import build_peft_config, load_model
from alignctl.models.vocabulary import check_same_tokens, rows_to_train

pytestmark = pytest.mark.train

SHORT = ("eval.prompts=0", "rehearse=false", "data.eval_rows=0")
TOOLS = "model.add_tokens=[<tool>,</tool>]"


@pytest.fixture(scope="module")
def tied(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def untied(tied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tied, folder)
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": "Add one.", "chosen": f" <tool>{i} + 1</tool> It is {i + 1}", "rejected": f" It is {i}"}
        for i in range(16)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


def dpo(folder, model, pairs, *arguments):
    """Two steps of DPO; the stage's folder."""
    given = ("recipe=dpo_local", f"model.path={model}", f"data.path={pairs}", "dpo.learning_rate=1e-2")
    steps = ("dpo.max_steps=2", "dpo.logging_steps=1", "dpo.warmup_steps=0", "dpo.per_device_train_batch_size=8")
    return run_stages(folder, *given, *steps, *SHORT, *arguments) / "dpo"


def rows_of(model):
    """Embeddings and LM head of a checkpoint."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    return loaded.get_input_embeddings().weight.detach(), loaded.get_output_embeddings().weight.detach()


def with_tokens(model, folder, *tokens, pad=None, special=False):
    """A copy of a checkpoint whose tokenizer has more tokens than there are embeddings."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
        config = folder / "config.json"
        described = json.loads(config.read_text()) | {"pad_token_id": tokenizer.pad_token_id}
        config.unlink()
        config.write_text(json.dumps(described))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_more_tokens_than_embeddings_are_refused_or_resized(tmp_path, tied, pairs, pad):
    """A pad token without embeddings of its own even in config.json, where transformers stumbles over it."""
    model = with_tokens(tied, tmp_path / "model", "<|im_start|>", pad=pad)
    count = 514 if pad else 513
    for arguments in ((), ("peft=lora",)):
        with pytest.raises(RequestError, match=rf"has {count} tokens, and .* has embeddings for 512; .*`<|im_start|>`"):
            dpo(tmp_path / "refused", model, pairs, *arguments)
    stage = dpo(tmp_path / "run", model, pairs, "model.resize_embeddings=true", "peft=lora")
    (new, _), (old, _) = rows_of(stage / "model"), rows_of(tied)
    assert new.shape[0] == count
    torch.testing.assert_close(new[:512], old, rtol=0, atol=0)
    torch.testing.assert_close(new[512:], old.mean(0).expand(count - 512, -1), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    assert (len(tokenizer), tokenizer.pad_token) == (count, pad or "<unk>")


def test_a_special_token_that_nothing_writes_needs_no_embeddings(tmp_path, tied):
    """As Gemma 3 has one for images, transformers#37011."""
    folder, said = with_tokens(tied, tmp_path / "model", "<image>", special=True), []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    load = partial(load_model, ModelSettings(), "policy", str(folder), peft={}, seed=0, notice=said.append)
    model = load(tokenizer)
    assert "has 513 tokens, and" in said[0]
    assert "none for `<image>`" in said[0]
    model(torch.tensor([tokenizer("An image")["input_ids"]]))
    with pytest.raises(RequestError, match=r"a row has the token `<image>`, for which .* has no embeddings"):
        model(torch.tensor([tokenizer("An <image>")["input_ids"]]))
    for key in ("chat_template", "eos_token", "pad_token"):
        other = AutoTokenizer.from_pretrained(folder)
        setattr(other, key, "{{ '<image>' + messages[0]['content'] }}" if key == "chat_template" else "<image>")
        with pytest.raises(RequestError, match=r"there is none for `<image>`"):
            load(other)


def test_another_tokenizer_with_more_tokens_is_refused(tmp_path, tied, pairs):
    other = with_tokens(tied, tmp_path / "other", "<|im_start|>")
    with pytest.raises(RequestError, match="has 513 tokens, and .* has embeddings for 512"):
        dpo(tmp_path / "run", tied, pairs, f"model.tokenizer={other}")


@pytest.mark.parametrize("start", ["tied", "untied"])
def test_an_adapter_learns_added_tokens_and_no_others(tmp_path, request, pairs, start):
    """The merged model says what base and adapter say, and a later stage of the same settings goes on from it."""
    base = request.getfixturevalue(start)
    stage = dpo(
        tmp_path, base, pairs, TOOLS, "peft=lora", "stages=[dpo,ipo]", "+method@ipo=ipo", "ipo.from=dpo",
        "ipo.max_steps=1", "ipo.max_length=256",
    )  # fmt: skip
    assert read(stage / "metrics.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # with embeddings at the mean
    for old, new in zip(rows_of(base), rows_of(stage / "model"), strict=True):
        torch.testing.assert_close(new[:512], old, rtol=0, atol=0)
        assert (new[512:] - old.mean(0)).abs().max() > 1e-3  # it learns
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    ids = torch.tensor([tokenizer(" <tool>1 + 1</tool> It is 2")["input_ids"]])
    assert {512, 513} <= set(ids[0].tolist())
    whole = AutoModelForCausalLM.from_pretrained(base)
    whole.resize_token_embeddings(514, mean_resizing=False)
    apart = PeftModel.from_pretrained(whole, stage / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(stage / "model").eval()
    assert merged.config.tie_word_embeddings == (start == "tied")
    with torch.no_grad():  # float32, added up in another order
        torch.testing.assert_close(merged(ids).logits, apart(ids).logits, rtol=1e-4, atol=1e-4)
    later = stage.parent / "ipo" / "model"
    assert len(AutoTokenizer.from_pretrained(later)) == 514
    assert rows_of(later)[0].shape[0] == 514


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"embed_tokens": [512], "lm_head": [512]}),
        ({"trainable_token_indices": None}, {"embed_tokens": [512], "lm_head": [512]}),
        ({"trainable_token_indices": [5]}, {"embed_tokens": [5, 512], "lm_head": [512]}),
        (
            {"trainable_token_indices": {"model.embed_tokens": [5]}},
            {"model.embed_tokens": [5, 512], "lm_head": [512]},
        ),
        ({"target_modules": ["model.embed_tokens", "q_proj"]}, {"lm_head": [512]}),
        ({"target_modules": ".*(embed_tokens|q_proj)"}, {"lm_head": [512]}),
        (
            {"target_modules": ["embed_tokens", "q_proj"], "exclude_modules": ["embed_tokens"]},
            {"embed_tokens": [512], "lm_head": [512]},
        ),
        ({"modules_to_save": ["model.embed_tokens", "lm_head"]}, None),
    ],
)
def test_added_tokens_are_trained_beside_what_settings_name(untied, given, expected):
    model = AutoModelForCausalLM.from_pretrained(untied)
    model.resize_token_embeddings(513, mean_resizing=False)
    rows = rows_to_train(model, [512], given)
    assert rows == expected
    adapter = build_peft_config({"type": "lora", "target_modules": ["q_proj"]} | given, "policy", rows)
    learns = [name for name, one in get_peft_model(model, adapter).named_parameters() if one.requires_grad]
    for layer in ("embed_tokens", "lm_head"):
        assert any(layer in name for name in learns)


def test_added_tokens_take_embeddings_that_have_no_token(tmp_path, untied, pairs):
    """Padding is not trained and may be anything; here it is nothing."""
    model, folder = AutoModelForCausalLM.from_pretrained(untied), tmp_path / "padded"
    shutil.copytree(untied, folder)
    model.resize_token_embeddings(576, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[512:] = 0
    model.save_pretrained(folder)
    stage = dpo(tmp_path / "run", folder, pairs, TOOLS, "dpo.learning_rate=1e-9")
    (new, _), (old, _) = rows_of(stage / "model"), rows_of(untied)
    assert new.shape[0] == 576
    torch.testing.assert_close(new[512:514], old.mean(0).expand(2, -1), rtol=0, atol=1e-6)
    assert not new[514:].any()


def test_ppo_with_added_tokens(tmp_path, untied, pairs):
    """The value model, an adapter too, has no LM head."""
    run = run_stages(
        tmp_path, "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", f"model.path={untied}",
        "model.scratch=null", f"data.path={pairs}", "eval=default", "ppo.max_steps=1", "ppo.reward_model=null",
        f"ppo.reward_funcs=[{REWARDS}:length]",
        "ppo.normalize_rewards=none", "ppo.response_length=4", "ppo.per_device_train_batch_size=8", TOOLS, "peft=lora",
        *SHORT,
    )  # fmt: skip
    assert rows_of(run / "ppo" / "model")[0].shape[0] == 514


def test_a_reference_reads_the_same_tokens(tmp_path, tied, pairs):
    """More tokens are another tokenizer, too: texts are divided otherwise."""
    other = with_tokens(tied, tmp_path / "other", "ough")
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.resize_token_embeddings(513)
    model.save_pretrained(other)
    with pytest.raises(
        RequestError, match="vocabulary than the policy: 513 tokens and 512; `ough` is number 512 there"
    ):
        dpo(tmp_path / "run", tied, pairs, f"dpo.reference={other}")


def test_a_reference_may_lack_what_rows_are_filled_up_with(tied):
    """An SFT model with a pad token of its own, and the base it was made from; the order of both does not matter."""
    base, padded, moved, chat = (AutoTokenizer.from_pretrained(tied) for _ in range(4))
    padded.add_special_tokens({"pad_token": "[PAD]"})
    check_same_tokens(padded, base, "base")
    check_same_tokens(base, padded, "sft")
    moved.add_special_tokens({"additional_special_tokens": ["<image>"]})
    moved.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(RequestError, match=r"`\[PAD\]` is number 513 there and 512 here"):
        check_same_tokens(padded, moved, "moved")
    chat.add_special_tokens({"eos_token": "<|im_end|>"})
    with pytest.raises(RequestError, match=r"`<\|im_end\|>` is number none there and 512 here"):
        check_same_tokens(chat, base, "base")


def test_a_reference_without_a_tokenizer(tmp_path, tied, pairs):
    """Then there is nothing to compare but the number of embeddings."""
    other = tmp_path / "other"
    shutil.copytree(tied, other, ignore=shutil.ignore_patterns("tokenizer*"))
    dpo(tmp_path / "run", tied, pairs, f"dpo.reference={other}")


def test_a_reward_model_with_fewer_embeddings(tmp_path, untied, tied, pairs):
    """As Qwen2.5's, whose sizes have other paddings: nothing is drawn that the smaller one could not read."""
    folder = tmp_path / "padded"
    shutil.copytree(untied, folder)
    model = AutoModelForCausalLM.from_pretrained(untied)
    model.resize_token_embeddings(1024, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[512:] = model.lm_head.weight[:512]
    model.save_pretrained(folder)
    reward = tmp_path / "reward"
    shutil.copytree(tied, reward)
    AutoModelForSequenceClassification.from_pretrained(tied, num_labels=1).save_pretrained(reward)
    run = run_stages(
        tmp_path / "run", "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", f"model.path={folder}",
        "model.scratch=null", f"data.path={pairs}", "eval=default", "ppo.max_steps=2", f"ppo.reward_model={reward}",
        "ppo.normalize_rewards=none", "ppo.response_length=16", "ppo.per_device_train_batch_size=8", *SHORT,
    )  # fmt: skip
    assert rows_of(run / "ppo" / "model")[0].shape[0] == 1024
