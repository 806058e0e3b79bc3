"""Puts an adapter into the weights under it."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def is_beside(name: str) -> bool:
    """Whether a weight of an adapted model, by its name, is the adapter's, and not of what it is put into."""
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens"))


def merged(trained: PeftModel) -> PreTrainedModel:
    """The model with its adapter in its weights: sums are taken in float32, and rounded once to the weights' type."""
    _untie(trained)
    for layer in trained.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            kind = next(base.parameters()).dtype
            base.to(torch.float32)
            layer.merge()
            base.to(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return trained.merge_and_unload()


def _untie(trained: PeftModel) -> None:
    """Gives the head weights of its own where an adapter changes it, or the embeddings, and both are one weight: merged
    into that, the change of one would be in the other. peft then says so in the model's config."""
    model = trained.get_base_model()
    both = [model.get_output_embeddings(), model.get_input_embeddings()]
    if None in both or not any(isinstance(one, LoraLayer) for one in both):
        return
    head, embeddings = (one.get_base_layer() if isinstance(one, LoraLayer) else one for one in both)
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
