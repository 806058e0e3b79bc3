"""Whether an adapter can be merged is known before it is trained, also where its layers cannot be tried."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny

from alignctl.errors import RequestError
from alignctl.models.adapting import check_merges


def biased(attention_bias: bool, device: str):
    with torch.device(device):
        model = tiny(attention_bias=attention_bias)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_bias=True))


@pytest.mark.parametrize("kind", ["whole", "4 bits", "divided"])
def test_a_bias_needs_one_to_be_merged_into(kind):
    device = "meta" if kind == "divided" else "cpu"
    models = [biased(attention_bias, device) for attention_bias in (True, False)]
    for model in models:
        model.is_loaded_in_4bit = kind == "4 bits"
    check_merges(models[0])
    with pytest.raises(RequestError, match=r"q_proj` has no bias to merge into"):
        check_merges(models[1])
