"""Checkpoints that cannot be read, or have no tokenizer: a sentence, exit code 2, nothing trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alignctl.config.schema import ModelSettings
from alignctl.errors import RequestError
from alignctl.models.loading import load_model, load_tokenizer
from alignctl.models.packing import put_packed_attention_on

pytestmark = pytest.mark.train


@pytest.fixture
def stories(tmp_path, shared_data):
    folder = tmp_path / "model"
    shutil.copytree(shared_data / "models" / "stories260K", folder)
    return folder


def load(folder):
    settings = ModelSettings(path=str(folder))
    tokenizer, _ = load_tokenizer(settings, str(folder), texts=list)
    return load_model(settings, "policy", str(folder), tokenizer, {}, seed=0)


def test_without_tokenizer_files_there_is_nothing_to_write_with(tmp_path):
    """transformers makes an empty tokenizer of the kind of the model, and training would have no tokens."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="has no tokenizer"):
        load_tokenizer(ModelSettings(path=str(tmp_path)), str(tmp_path), texts=list)


def test_half_a_file_of_weights(stories):
    file = stories / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RequestError, match="model.safetensors has .* bytes, and by its header"):
        load(stories)


def test_a_config_that_contradicts_itself(stories):
    described = json.loads((stories / "config.json").read_text())
    layers = described["num_hidden_layers"]
    described |= {"model_type": "qwen2", "layer_types": ["full_attention"] * layers, "num_hidden_layers": layers + 1}
    (stories / "config.json").write_text(json.dumps(described))
    with pytest.raises(RequestError, match="cannot load .*num_hidden_layers"):
        load(stories)


def test_weights_that_are_no_numbers_are_not_a_matter_of_packing():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="not finite"):
        put_packed_attention_on(model, torch.device("cpu"))
