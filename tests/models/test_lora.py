"""LoRA's product on a CPU: peft's numbers, and peft itself where the layer is of another kind."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from alignctl.models.lora import make_lora_fast


def adapted(bias=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Linear(10, 4, bias=bias))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=False, **options)
    return get_peft_model(model, config)


def outcome(model, x):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    out = model(x)
    (out**2).sum().backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return {"out": out.detach(), "x": x.grad} | trained


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_it_computes_what_peft_does(options):
    model = adapted(**options)
    fast = copy.deepcopy(model)
    make_lora_fast(fast)
    x = torch.randn(2, 5, 6)
    expected, found = outcome(model, x), outcome(fast, x)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, msg=name)


def test_an_adapter_that_is_added_later_and_none():
    model = adapted()
    fast = copy.deepcopy(model)
    make_lora_fast(fast)
    x = torch.randn(5, 6)
    for one in (model, fast):
        torch.manual_seed(1)
        one.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        one.set_adapter("other")
    torch.testing.assert_close(fast(x), model(x))
    with model.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x), model(x))
    model.set_adapter("default")
    model.merge_adapter()
    fast.set_adapter("default")
    fast.merge_adapter()
    assert torch.equal(fast(x), model(x))


def test_dropout_is_peft_s():
    model = adapted(lora_dropout=0.5).train()
    fast = copy.deepcopy(model)
    make_lora_fast(fast)
    x = torch.randn(5, 6)
    found = []
    for one in (model, fast):
        torch.manual_seed(1)
        found.append(one(x))
    assert torch.equal(*found)


def test_other_precisions_are_peft_s():
    model = adapted()
    fast = copy.deepcopy(model)
    make_lora_fast(fast)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), model(x))
    for one in (model, fast):
        for name, parameter in one.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    assert torch.equal(fast(x.bfloat16()), model(x.bfloat16()))
