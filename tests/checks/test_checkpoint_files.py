"""What the files of a checkpoint say is found by the check: adapters, other heads, quantized weights, pickles."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, read_request

PAIRS = "builtin:quickstart"
LM = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a whole file of safetensors
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def folder(path: Path, config: dict | None = None, adapter: dict | None = None, weights: str = "model.safetensors"):
    path.mkdir(parents=True)
    for name, content in (("config.json", config), ("adapter_config.json", adapter)):
        if content is not None:
            (path / name).write_text(json.dumps(content))
    (path / weights).write_bytes(NO_TENSORS)
    return path


def problems(recipe: str, *arguments: str):
    config, unread = compose(read_request([f"recipe={recipe}", f"data.path={PAIRS}", *arguments]))
    return [*unread, *find_problems(config)]


def only(recipe: str, *arguments: str):
    (problem,) = problems(recipe, *arguments)
    return problem


@pytest.mark.parametrize("with_config", [False, True], ids=["alone", "with config.json"])
@pytest.mark.parametrize("key", ["model.path", "dpo.reference"])
def test_an_adapter_is_said_to_be_one(tmp_path, with_config, key):
    whole = folder(tmp_path / "whole", LM)
    adapter = {"base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM"}
    path = folder(tmp_path / "theirs", LM if with_config else None, adapter, "adapter_model.safetensors")
    problem = only("dpo_local", f"model.path={whole}", f"{key}={path}")
    assert problem.message == f"`{key}={path}` is an adapter of owner/base, and a whole model is needed"
    assert f"`{key}=MERGED`: python -c " in problem.hint
    assert "AutoPeftModelForCausalLM" in problem.hint
    assert "merge_and_unload" in problem.hint


def test_of_an_adapter_of_ours_the_merged_model_is_named(tmp_path):
    folder(tmp_path / "dpo" / "model", LM)
    path = folder(tmp_path / "dpo" / "adapter", None, {"base_model_name_or_path": "owner/base"})
    problem = only("dpo_local", f"model.path={path}")
    assert problem.hint == f"name the model that it is merged into, `model.path={tmp_path / 'dpo' / 'model'}`"


def test_of_weights_in_shares_the_finished_model_is_named(tmp_path):
    shares = folder(
        tmp_path / "sft" / "checkpoints" / "checkpoint-5", LM, None, "shard-00001-model-00001-of-00001.safetensors"
    )
    problem = only("dpo_local", f"model.path={shares}")
    assert problem.message.startswith(f"`model.path={shares}` is a checkpoint to continue training from")
    assert problem.hint == "run its command again: the stage ends with a model"
    model = folder(tmp_path / "sft" / "model", LM)
    assert only("dpo_local", f"model.path={shares}").hint == f"name the stage's model, `model.path={model}`"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Puts a checkpoint into the local cache of the Hub, which is empty but for that."""
    from huggingface_hub import constants

    def put(name: str, *files):
        cache = tmp_path / f"models--owner--{name}"
        folder(cache / "snapshots" / ("a" * 40), *files)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("a" * 40)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    return put


def test_what_is_in_the_local_cache_is_looked_at_whoever_asks(cached):
    cached("short", LM | {"max_position_embeddings": 64})
    found = only("sft_local", "model.path=owner/short", "sft.max_length=128")
    assert "`sft.max_length=128` is longer than the model can see: 64 tokens" in found.message
    cached("rm", None, {"base_model_name_or_path": "owner/other", "task_type": "SEQ_CLS"})
    given = (
        "stages=[ppo]",
        "ppo.from=null",
        "model.path=owner/base",
        "model.scratch=null",
        "peft=lora",
        "eval=default",
    )
    found = problems("rlhf_quickstart", *given, "ppo.sharing=shared_base", "ppo.reward_model=owner/rm")
    assert any("is an adapter of owner/other, but `ppo` starts from `owner/base`" in one.message for one in found), (
        found
    )


def test_an_adapter_in_the_local_cache_of_the_hub_is_seen(cached):
    cached("adapter", None, {"base_model_name_or_path": "owner/base"})
    assert "owner/adapter` is an adapter of owner/base" in only("sft_local", "model.path=owner/adapter").message
    assert problems("sft_local", "model.path=owner/other") == []


@pytest.mark.parametrize(
    ("key", "recipe", "config", "words"),
    [
        ("model.path", "sft_local", {"architectures": ["LlamaForSequenceClassification"]}, "LM head are missing"),
        ("dpo.reference", "dpo_local", {"architectures": ["LlamaForTokenClassification"]}, "LM head are missing"),
        ("ppo.reward_model", "rlhf_quickstart", LM, "a head that scores are missing"),
        (
            "ppo.reward_model",
            "rlhf_quickstart",
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}},
            "gives 2 scores \\(bad, good\\), and a reward model gives one",
        ),
        (
            "model.path",
            "reward_local",
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}},
            "gives 2 scores",
        ),
    ],
)  # fmt: skip
def test_another_head_is_seen(tmp_path, key, recipe, config, words):
    arguments = [f"model.path={folder(tmp_path / 'whole', LM)}"] if recipe.endswith("local") else []
    if recipe == "rlhf_quickstart":
        arguments += ["stages=[sft,ppo]", "ppo.normalize_rewards=running"]
    problem = only(recipe, *arguments, f"{key}={folder(tmp_path / 'other', config)}")
    assert re.search(words, problem.message), problem.message


def test_heads_that_a_role_may_have(tmp_path):
    """A reward stage starts from either kind, and a class by another name may be a reward model."""
    for number, config in enumerate(
        (LM, {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}})
    ):
        assert problems("reward_local", f"model.path={folder(tmp_path / str(number), config)}") == []
    special = folder(tmp_path / "special", {"architectures": ["LlamaForRewardModel"]})
    arguments = ("stages=[sft,ppo]", "ppo.normalize_rewards=running", f"ppo.reward_model={special}")
    assert problems("rlhf_quickstart", *arguments) == []


@pytest.mark.parametrize(
    "how",
    [
        {"quantization_config": {"quant_method": "gptq"}}, {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"quant_method": "fp8"}}, {"quantization_config": {"quant_method": "mxfp4"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=str,
)  # fmt: skip
def test_quantized_weights_that_are_not_taken(tmp_path, how):
    problem = only("sft_local", f"model.path={folder(tmp_path / 'q', LM | how)}", "peft=lora")
    assert f"is quantized ({next(iter(how.values()))['quant_method']}" in problem.message
    assert "peft=qlora" in problem.hint


@pytest.mark.parametrize("section", [BNB, {"load_in_4bit": True}], ids=["now", "formerly"])
def test_four_bits_take_an_adapter_and_what_it_is_merged_into(tmp_path, section):
    path = folder(tmp_path / "q", LM | {"quantization_config": section})
    base, wider = folder(tmp_path / "base", LM), folder(tmp_path / "wider", LM | {"hidden_size": 128})
    start = f"model.path={path}"
    assert "cannot be trained, but an adapter on them can" in only("sft_local", start).message
    assert "`model.merge_into=...`" in only("sft_local", start, "peft=lora").hint
    assert problems("sft_local", start, "peft=lora", f"model.merge_into={base}") == []
    problem = only("sft_local", start, "peft=lora", f"model.merge_into={wider}")
    assert problem.message.endswith("their `hidden_size` are 128 and 64")
    problem = only("sft_local", f"model.path={base}", "peft=lora", f"model.merge_into={base}")
    assert "`model.merge_into" in problem.message
    assert "would have no effect" in problem.message
    assert problems("dpo_local", f"model.path={base}", f"dpo.reference={path}") == []


def test_four_bits_need_their_package(tmp_path, monkeypatch):
    path = folder(tmp_path / "q", LM | {"quantization_config": BNB})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    problem = only("sft_local", f"model.path={path}", "peft=lora", f"model.merge_into={folder(tmp_path / 'b', LM)}")
    assert problem.hint == 'pip install "alignctl[bitsandbytes]"'


def test_pickled_weights_and_none(tmp_path):
    path = folder(tmp_path / "old", LM, weights="pytorch_model.bin")
    (path / "training_args.bin").touch()
    problem = only("sft_local", f"model.path={path}")
    assert "has its weights in pytorch_model.bin: other files than safetensors can run code" in problem.message
    assert "use_safetensors" not in problem.hint
    assert f"M.from_pretrained('{path}').save_pretrained('NEW')" in problem.hint
    assert (
        "no weights"
        in only("sft_local", f"model.path={folder(tmp_path / 'n', LM, weights='training_args.bin')}").message
    )


def test_a_tokenizer_that_is_sentencepiece_s_alone(tmp_path, monkeypatch):
    path = folder(tmp_path / "llama2", LM)
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    find = importlib.util.find_spec
    absent = ("sentencepiece", "google.protobuf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    problem = only("sft_local", f"model.path={path}")
    assert "only as tokenizer.model, which the packages `sentencepiece` and `protobuf` read" in problem.message
    assert problem.hint == 'pip install "alignctl[sentencepiece]"'
    (path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    assert problems("sft_local", f"model.path={path}") == []
    (path / "tokenizer.model").write_bytes(b"\n\x0e")
    (path / "tokenizer.json").touch()
    assert problems("sft_local", f"model.path={path}") == []


@pytest.mark.parametrize("arguments", [["sft.fp16=true"], []], ids=["with fp16", "alone"])
def test_float16_weights_are_not_trained(tmp_path, arguments):
    path = folder(tmp_path / "whole", LM)
    problem = only("sft_local", f"model.path={path}", "model.dtype=float16", *arguments)
    assert "`model.dtype=float16`, and all weights are trained" in problem.message
    assert problems("sft_local", f"model.path={path}", "model.dtype=float16", "peft=lora") == []
    assert problems("sft_local", f"model.path={path}", "sft.fp16=true") == []


@pytest.mark.parametrize("given", ["[<tool>,</tool>]", '["<tool>","</tool>"]', "[ <tool>, </tool> ]"])
def test_tokens_need_no_quotes(given):
    config, unread = compose(read_request(["recipe=sft_local", f"model.add_tokens={given}"]))
    assert unread == []
    assert config["model"]["add_tokens"] == ["<tool>", "</tool>"]
