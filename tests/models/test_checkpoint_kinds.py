"""Checkpoints as people have them: what our errors and READMEs say to type works, on real files."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.files import read
from support.in_process import frozen, run_stages
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from alignctl.config.schema import ModelSettings
from alignctl.errors import RequestError
from alignctl.models.loading import load_model

pytestmark = pytest.mark.train

SHORT = ("eval.prompts=0", "rehearse=false", "data.eval_rows=0", "data.limit=16")
IDS = torch.arange(260, 280)[None]


@pytest.fixture(scope="module")
def base(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def rows(shared_data):
    return {
        "sft": shared_data / "sft/llms_from_scratch/train.jsonl",
        "rm": shared_data / "preference/llms_from_scratch_pref/train.jsonl",
    }


def run(folder, rows, stage, *arguments):
    recipe = "reward_local" if stage == "rm" else f"{stage}_local"
    given = (f"recipe={recipe}", f"data.path={rows[stage]}", f"{stage}.max_steps=2", f"{stage}.logging_steps=1")
    return run_stages(folder, *given, f"{stage}.learning_rate=1e-2", *SHORT, *arguments) / stage


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def typed(hint):
    """Runs the Python of a hint in the current folder, as somebody does who pastes it into a shell."""
    python, option, code = shlex.split(hint[hint.index("python -c ") :])
    exec(code, {})


def test_an_adapter_is_merged_as_the_hint_says(tmp_path, rows, base, monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RequestError, match="is an adapter of") as raised:
        run(tmp_path / "run", rows, "sft", f"model.path={tmp_path / 'theirs'}")
    monkeypatch.chdir(tmp_path)
    typed(raised.value.problems[0].hint)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED")), logits(model), rtol=1e-4, atol=1e-4
    )
    run(tmp_path / "run", rows, "sft", f"model.path={tmp_path / 'MERGED'}")


def test_pickled_weights_are_converted_as_the_hint_says(tmp_path, rows, base, monkeypatch):
    folder = tmp_path / "old"
    shutil.copytree(base, folder)
    torch.save(AutoModelForCausalLM.from_pretrained(base).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="has its weights in pytorch_model.bin") as raised:
        run(tmp_path / "run", rows, "sft", f"model.path={folder}")
    monkeypatch.chdir(tmp_path)
    typed(raised.value.problems[0].hint)
    run(tmp_path / "run", rows, "sft", f"model.path={tmp_path / 'NEW'}")


def test_the_adapter_of_a_reward_stage_is_loaded_as_its_readme_says(tmp_path, rows, base, monkeypatch):
    stage = run(tmp_path, rows, "rm", f"model.path={base}", "peft=lora", "model.add_tokens=[<tool>]")
    readme = (stage / "adapter" / "README.md").read_text()
    assert "It is a reward model: the adapter brings the head `score` with it" in readme
    code = readme.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(stage / "adapter")
    names: dict = {}
    exec(code, names)
    tokenizer, merged = names["tokenizer"], AutoModelForSequenceClassification.from_pretrained(stage / "model")
    ids = tokenizer(["Once upon a time</s>", "The <tool>"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found, expected = (one.eval()(**ids).logits for one in (names["model"], merged))
    assert found.shape == (2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sentencepiece", "google"))), reason="sentencepiece or protobuf is missing"
)
def test_sentencepiece_s_own_file(tmp_path, rows, base, monkeypatch):
    import sentencepiece

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["output"] for row in read(rows["sft"])[:300]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "tokenizer.model", folder)
    described = read(folder / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    stage = run(tmp_path / "run", rows, "sft", f"model.path={folder}")
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = "Once upon a time, there was a cat."
    assert AutoTokenizer.from_pretrained(stage / "model").encode(text, add_special_tokens=False) == processor.encode(
        text
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(RequestError, match="the packages `sentencepiece` and `protobuf` read") as raised:
        frozen(tmp_path / "never", "recipe=sft_local", f"data.path={rows['sft']}", f"model.path={folder}")
    assert raised.value.problems[0].hint == 'pip install "alignctl[sentencepiece]"'


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, "`temperature=0.9`, `top_p=0.6`"),
        ({"length_penalty": 2.0, "num_beams": 1, "do_sample": True, "temperature": 0.7}, "`length_penalty=2.0`"),
        ({"output_scores": True, "do_sample": True, "top_k": 5}, "`output_scores=True`"),
    ],
    ids=["sampling", "beams", "outputs"],
)
def test_settings_of_generating_that_would_not_be_saved(tmp_path, rows, base, settings, left_out):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "bos_token_id": 1} | settings))
    stage = run(tmp_path / "run", rows, "sft", f"model.path={folder}")
    assert left_out in " ".join(read(stage / "progress.json")["notices"])
    saved = read(stage / "model" / "generation_config.json")
    assert saved["eos_token_id"] == [2, 1]
    kept = {key: value for key, value in settings.items() if value not in (False, 1) and f"`{key}=" not in left_out}
    assert {key: saved.get(key) for key in kept} == kept


def test_settings_of_generating_that_nobody_can_read(tmp_path, rows, base):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 0}))
    with pytest.raises(RequestError, match="cannot load .*: `max_new_tokens` must be greater than 0"):
        run(tmp_path / "run", rows, "sft", f"model.path={folder}")


@pytest.fixture(scope="module")
def in_four_bits(base, tmp_path_factory):
    """A Llama whose sizes bitsandbytes takes on a CPU, and the same in 4 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("four_bits")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "whole")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder / "whole", quantization_config=four_bits).save_pretrained(
        folder / "quantized"
    )
    for name in ("whole", "quantized"):
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_an_adapter_on_four_bits_is_merged_into_what_they_were_made_from(tmp_path, rows, in_four_bits, stage, peft):
    given = (f"model.path={in_four_bits / 'quantized'}", f"peft={peft}", "peft.lora_dropout=0")
    found = run(tmp_path, rows, stage, *given, f"model.merge_into={in_four_bits / 'whole'}")
    kind = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    merged = kind.from_pretrained(found / "model")
    assert "quantization_config" not in read(found / "model" / "config.json")
    start = LlamaForCausalLM.from_pretrained(in_four_bits / "whole").model
    moved = [(a - b).abs().max() for a, b in zip(merged.model.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 1e-4
    assert not moved[0]  # of the embeddings


def test_an_adapter_on_four_bits_is_kept_alone(tmp_path, rows, in_four_bits):
    given = (f"model.path={in_four_bits / 'quantized'}", "peft=lora")
    with pytest.raises(RequestError, match="merged into 4 bits is rounded away") as raised:
        run(tmp_path / "never", rows, "sft", *given)
    assert "`model.merge_into=...`, or keep the adapter alone, `model.merge=false`" in raised.value.problems[0].hint
    stage = run(tmp_path / "run", rows, "sft", *given, "model.merge=false")
    assert (stage / "adapter" / "adapter_model.safetensors").is_file()
    assert not (stage / "model").exists()


def test_what_is_not_quantized_is_not_merged_into_another(base):
    """As the worker sees a Hub id whose files were not here when the run was checked."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    load = partial(load_model, role="policy", start=str(base), tokenizer=tokenizer, peft={"type": "lora"}, seed=0)
    with pytest.raises(RequestError, match=r"`model.merge_into=.*` would have no effect"):
        load(ModelSettings(path=str(base), merge_into=str(base)), trained=True)
    load(ModelSettings(path="owner/first", merge_into=str(base)), trained=True)  # a later stage goes on from another


def mixture(base, folder, kind):
    """A small model of experts with random weights."""
    not_its_own = shutil.ignore_patterns("config.json", "generation_config.json", "*.safetensors")
    shutil.copytree(base, folder, ignore=not_its_own)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    parts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **parts)).save_pretrained(folder)
    return folder


def test_a_mixture_that_trl_cannot_balance(tmp_path, rows, base):
    folder = mixture(base, tmp_path / "model", "granitemoe")
    with pytest.raises(RequestError, match="the mixture of experts of models of type `granitemoe`") as raised:
        run(tmp_path / "run", rows, "sft", f"model.path={folder}")
    assert "`router_aux_loss_coef=0.0`" in raised.value.problems[0].hint
    run(tmp_path / "run", rows, "sft", f"model.path={folder}", "sft.router_aux_loss_coef=0")


def test_a_mixture_that_it_can_answers_while_it_is_measured(tmp_path, rows, base):
    folder = mixture(base, tmp_path / "model", "mixtral")
    asked = ("eval.prompts=2", "eval.max_new_tokens=4", "data.eval_rows=4")
    stage = run(tmp_path / "run", rows, "sft", f"model.path={folder}", *asked)
    assert len(read(stage / "samples.jsonl")) == 2
    # Experts that are used alike give as many as a token takes.
    assert read(stage / "metrics.jsonl")[0]["aux_loss"] == pytest.approx(2, rel=0.1)


def test_a_reward_model_without_a_chat_template(tmp_path, base):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": f"Say {i}"}]}) + "\n" for i in range(8)))
    reward = tmp_path / "reward"
    shutil.copytree(base, reward)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(reward)
    arguments = (
        "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", f"model.path={base}", "model.scratch=null",
        f"data.path={file}", "data.format=prompt", f"model.chat_template={template}", "eval=default", *SHORT,
        f"ppo.reward_model={reward}", "ppo.normalize_rewards=none", "ppo.response_length=4", "ppo.max_steps=1",
        "ppo.per_device_train_batch_size=8",
    )  # fmt: skip
    with pytest.raises(
        RequestError, match="rows are conversations, and the reward model .* has no chat template"
    ) as raised:
        run_stages(tmp_path / "run", *arguments)
    assert "`chat_template.jinja`" in raised.value.problems[0].hint
    shutil.copy(template, reward / "chat_template.jinja")
    run_stages(tmp_path / "run", *arguments)
