"""Adapters on every kind of weight: LoRA, DoRA and QLoRA train, are saved, and are merged without loss."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.files import read
from support.in_process import run_stages
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignctl.models.generation import end_tokens
from alignctl.models.loading import load_model

pytestmark = pytest.mark.train

QUICK = ("data.limit=48", "data.eval_limit=16", "eval.prompts=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of the quickstart world that has not learnt much."""
    run = run_stages(
        tmp_path_factory.mktemp("base"), "recipe=sft_quickstart", *QUICK, "sft.max_steps=4",
        "model.scratch.vocab_size=400",
        "model.scratch.config.hidden_size=64", "model.scratch.config.intermediate_size=64",
    )  # fmt: skip
    return run / "sft" / "model"


def trained(folder, base, *more: str):
    run = run_stages(
        folder, "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", f"model.path={base}",
        "model.scratch=null", *QUICK, "dpo.max_steps=2", "dpo.logging_steps=1", "dpo.learning_rate=1e-2", *more,
    )  # fmt: skip
    return run / "dpo"


IDS = torch.arange(5, 30)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("peft", ["lora", "dora", "lora_attention"])
def test_the_merged_model_is_the_adapter_on_its_base(tmp_path, base, peft):
    more = ["dpo.disable_dropout=false"] if peft == "lora_attention" else []
    stage = trained(tmp_path, base, f"peft={peft}", "eval.prompts=4", "eval.max_new_tokens=8", *more)
    merged = AutoModelForCausalLM.from_pretrained(stage / "model")
    start = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), stage / "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(start)).abs().max() > 1e-3  # it did learn
    result = read(stage / "result.json")
    assert result["before"]["kl"] == 0 < result["after"]["kl"]
    names = load_file(stage / "adapter" / "adapter_model.safetensors").keys()
    assert any("lora_magnitude_vector" in name for name in names) == (peft == "dora")


def test_modules_trained_whole_beside_an_adapter_are_merged_too(tmp_path, base):
    """As orpo_llama3 does with the embeddings and the LM head of a base model."""
    untied = AutoModelForCausalLM.from_pretrained(base)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    folder = tmp_path / "untied"
    shutil.copytree(base, folder)
    untied.save_pretrained(folder)
    stage = trained(tmp_path / "run", folder, "peft=lora", "peft.modules_to_save=[embed_tokens,lm_head]")
    merged, start = load_file(stage / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (merged[name] - start[name]).abs().max() > 1e-3, name
    model = AutoModelForCausalLM.from_pretrained(stage / "model")
    torch.testing.assert_close(model.lm_head.weight, merged["lm_head.weight"])


def test_qlora_trains_bf16_adapters_on_four_bits_and_merges_into_whole_weights(tmp_path, base):
    stage = trained(tmp_path, base, "peft=qlora", "peft.r=4", "dpo.use_cpu=true")
    adapter = load_file(stage / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    saved = load_file(stage / "model" / "model.safetensors")
    start = AutoModelForCausalLM.from_pretrained(base)
    assert {tensor.dtype for tensor in saved.values()} == {start.dtype}  # no 4-bit weights in it
    adapted = PeftModel.from_pretrained(start, stage / "adapter").merge_and_unload()
    for name, tensor in adapted.state_dict().items():
        if name in saved:
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)
    assert read(stage / "result.json")["steps"] == 2


def test_four_bits_are_nf4(base):
    from transformers import AutoTokenizer

    from alignctl.config.schema import ModelSettings

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(ModelSettings(path=str(base)), "policy", str(base), tokenizer, {"type": "qlora"}, 0)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_type == "nf4"
    assert layer.compute_dtype == torch.bfloat16


def test_bitsandbytes_is_asked_for(base, monkeypatch):
    from alignctl.errors import RequestError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RequestError, match="`peft.type=qlora` needs the package `bitsandbytes`"):
        trained(base.parent / "never", base, "peft=qlora")
    with pytest.raises(RequestError, match="`dpo.optim=adamw_8bit` needs the package `bitsandbytes`"):
        trained(base.parent / "never", base, "dpo.optim=adamw_8bit")


def test_qlora_without_a_gpu_is_refused_before_training(alignctl, base):
    done = alignctl("train", "recipe=dpo_local", f"model.path={base}", "data.path=builtin:quickstart", "peft=qlora",
                    "dpo.max_length=64")  # fmt: skip
    assert done.code == 3
    assert "`peft.type=qlora` of `dpo` needs a GPU" in done.err


@pytest.mark.parametrize("peft", ["none", "lora", "qlora"])
def test_a_reward_model_is_saved_with_its_head(tmp_path, base, peft):
    run = run_stages(
        tmp_path, "recipe=sft_rm_quickstart", "stages=[rm]", "rm.from=null", f"model.path={base}", "model.scratch=null",
        *QUICK, "rm.max_steps=3", f"peft={peft}", "rm.learning_rate=1e-2",
        *(["rm.use_cpu=true"] if peft == "qlora" else []),
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(run / "rm" / "model")
    assert model.config.num_labels == 1
    saved = load_file(run / "rm" / "model" / "model.safetensors")
    torch.testing.assert_close(model.score.weight, saved["score.weight"].to(model.dtype))
    scores = model.eval()(input_ids=torch.tensor([[5, 6, 7], [8, 9, model.config.pad_token_id]])).logits
    assert scores.shape == (2, 1)
    assert scores.isfinite().all()
    statistics = read(run / "rm" / "model" / "reward_statistics.json")
    assert statistics["answers"] == 32
    assert statistics["source"] == "held-out pairs"
    assert statistics["std"] > 0


def test_statistics_without_held_out_rows_are_of_training_rows(tmp_path, base):
    run = run_stages(
        tmp_path, "recipe=reward_local", f"model.path={base}", "data.path=builtin:quickstart", "data.limit=8",
        "data.eval_limit=4", "rm.max_steps=1", "rm.max_length=64",
    )  # fmt: skip
    assert read(run / "rm" / "model" / "reward_statistics.json")["answers"] == 8


def test_an_end_token_that_is_named_ends_answers(base):
    from transformers import AutoTokenizer

    from alignctl.config.schema import ModelSettings
    from alignctl.models.loading import load_tokenizer

    settings = ModelSettings(path=str(base), eos_token="<|user|>")
    tokenizer, _ = load_tokenizer(settings, str(base), texts=list)
    model = load_model(settings, "policy", str(base), tokenizer, {}, 0)
    assert tokenizer.eos_token == "<|user|>"
    was = AutoTokenizer.from_pretrained(base).eos_token_id
    assert end_tokens(model, tokenizer) == sorted({was, tokenizer.eos_token_id})
    assert model.generation_config.eos_token_id == end_tokens(model, tokenizer)
