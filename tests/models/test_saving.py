"""A saved model is read before it counts: what is not as it was trained is named, and nothing of it is left."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from alignctl.data.quickstart import demonstrations
from alignctl.errors import AlignctlError
from alignctl.models.comparing import said_of
from alignctl.models.saving import Configs, Trained, save_finished
from alignctl.models.tokenizer import train_tokenizer
from alignctl.models.verifying import check_saved
from alignctl.run.paths import StagePaths

pytestmark = pytest.mark.train

SIZES = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama(tied: bool = True) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def mixtral():
    """Its experts are saved under other names, and cut otherwise, than the model has them."""
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2))


def adapter():
    return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([row["prompt"][0]["content"] for row in demonstrations("train")[:50]], 96)


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tied=False), mixtral, adapter], ids=["llama", "untied", "mixtral", "adapter"]
)
@pytest.mark.parametrize("shard", ["1GB", "15KB"])
def test_what_is_whole_passes(tmp_path, make, shard):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    check_saved(tmp_path, model)


def test_one_process_reads_alone_under_zero_3(tmp_path):
    pytest.importorskip("deepspeed")
    model = llama()
    model.save_pretrained(tmp_path)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    check_saved(tmp_path, model)
    assert is_deepspeed_zero3_enabled()  # as it was, for the training
    assert config.is_zero3()


NAME = "model.layers.0.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def damaged(folder, name, tensor):
    """Replaces a tensor of a saved model, or takes it out."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    assert name in tensors or name == "other"
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "name", "tensor", "words"),
    [
        (llama, NAME, torch.empty(0), "is empty; .*has the shape \\[0\\], not \\[32, 16\\]"),
        (llama, NAME, torch.zeros(16, 32), "has the shape \\[16, 32\\], not \\[32, 16\\]"),
        (llama, NAME, torch.full((32, 16), torch.inf), "holds NaN or infinite numbers"),
        (llama, NAME, None, f"`{NAME}` is missing"),
        (llama, "other", torch.ones(2), "`other` is not a weight of this model"),
        (lambda: llama(tied=False), "lm_head.weight", None, "`lm_head.weight` is missing"),
        (adapter, LORA, torch.empty(0), "adapter .* is empty; .* has the shape \\[0\\], not \\[16, 8\\]"),
        (adapter, LORA, torch.full((16, 8), torch.nan), "holds NaN"),
        (adapter, LORA, None, f"`{LORA}` is missing"),
        (adapter, "other", torch.ones(2), "`other` is not a weight of this adapter"),
    ],
)
def test_what_is_not_is_named(tmp_path, make, name, tensor, words):
    model = make()
    model.save_pretrained(tmp_path)
    damaged(tmp_path, name, tensor)
    with pytest.raises(AlignctlError, match=words):
        check_saved(tmp_path, model)


def test_a_torn_file_is_named(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AlignctlError, match="a file is not whole"):
        check_saved(tmp_path, model)


def test_no_weights_at_all(tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AlignctlError, match="there are no weights"):
        check_saved(tmp_path, model)


ROWS = [torch.arange(4, 30), torch.arange(20, 60)]


def save(folder, model, tokenizer, start=None, **how):
    """Saves a model as a stage does."""
    start = start or copy.deepcopy(Configs(model.config, model.generation_config))
    trained = Trained(model, start, ROWS, **({"said": said_of(model, ROWS)} | how))
    return save_finished(trained, tokenizer, StagePaths(folder), llama, {"facts.json": {"a": 1}}, {})


@pytest.mark.parametrize("make", [llama, adapter])
def test_nothing_is_left_of_what_was_not_saved_right(tmp_path, tokenizer, make):
    model = make()
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[0] = torch.nan
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.nan
    with pytest.raises(AlignctlError, match="holds NaN"):
        save(tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_right_is_there(tmp_path, tokenizer):
    save(tmp_path, adapter(), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
    assert json.loads((tmp_path / "model" / "facts.json").read_text()) == {"a": 1}
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    for folder in (tmp_path / "model", tmp_path / "adapter"):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
        assert {name: facts["bytes"] for name, facts in files.items()} == there


@pytest.mark.parametrize("scores", ["large", "small"])
def test_rounding_of_scores_is_held_to_their_size(tmp_path, tokenizer, scores):
    """A head that scores has no unit: for scores of a few hundred, 16 bits cost more than 0.25."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    size = 300 / said_of(model, ROWS).abs().mean()
    with torch.no_grad():
        model.score.weight *= size if scores == "large" else 1
    saved = save(tmp_path, model, tokenizer, Configs(model.config, None), dtype=torch.bfloat16)
    assert saved.rounded
    assert (saved.difference.mean > 0.25) == (scores == "large")


@pytest.mark.parametrize(("dtype", "words"), [(torch.bfloat16, "save_dtype=float32"), (None, "checkpoints")])
def test_other_scores_are_a_fault_however_large_they_are(tmp_path, tokenizer, dtype, words):
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    with pytest.raises(AlignctlError, match="not saved as it was trained") as caught:
        save(tmp_path, model, tokenizer, Configs(model.config, None), dtype=dtype, said=torch.tensor([300.0, -300.0]))
    assert words in caught.value.problems[0].hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_16_bits", [True, False])
def test_what_was_said_in_16_bits_is_compared_as_rounded(tmp_path, tokenizer, in_16_bits):
    """As FSDP2 computes in bfloat16 with weights that are, and are saved, in float32."""
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # random weights are so small that hardly anything is rounded
    said = said_of(copy.deepcopy(model).to(torch.bfloat16), ROWS)
    how = {"said": said, "computed_in_16_bits": in_16_bits}
    if in_16_bits:
        saved = save(tmp_path, model, tokenizer, **how)
        assert saved.rounded
        assert saved.difference.largest > 1e-3  # nats
    else:
        with pytest.raises(AlignctlError, match="not saved as it was trained"):
            save(tmp_path, model, tokenizer, **how)
