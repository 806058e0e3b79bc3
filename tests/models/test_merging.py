"""Adapters that are in the weights for a while, and weights that are afterwards what they were, bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from alignctl.models.adapters import Adapters
from alignctl.models.lora import make_lora_fast
from alignctl.models.merging import bytes_kept, merged_meanwhile

IDS = torch.arange(3, 35).view(2, 16)
EVERY_KIND = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"trainable_token_indices": [4, 9]},
    {"modules_to_save": ["lm_head"]},
]


def adapted(kind=torch.float32, tied=False, **options):
    torch.manual_seed(0)
    model = tiny("llama", tie_word_embeddings=tied).to(kind)
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**lora | options)).eval()
    for name, weight in model.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(weight)
    make_lora_fast(model)
    return model


def state(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    """The same bytes in the same places: a graph or an optimizer may know them by their addresses."""
    for name, tensor in model.state_dict().items():
        place, values = before[name]
        assert tensor.data_ptr() == place, name
        assert torch.equal(tensor.view(torch.uint8), values.view(torch.uint8)), name


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name][1])}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", EVERY_KIND, ids=lambda options: " ".join(options) or "plain")
def test_the_weights_are_what_they_were(kind, options):
    model = adapted(kind, **options)
    before, expected = state(model), logits(model)
    with merged_meanwhile(model):
        assert {tensor.data_ptr() for tensor in model.state_dict().values()} == {place for place, _ in before.values()}
        assert changed(model, before)
        error = (logits(model) - expected).norm() / expected.norm()
        assert error < (1e-5 if kind == torch.float32 else 3e-2)  # sums in another order; weights rounded anew
    assert_untouched(model, before)
    assert torch.equal(logits(model), expected)


def test_peft_s_own_way_back_would_not_do():
    """Otherwise there would be no need for this."""
    model = adapted(torch.bfloat16)
    before = state(model)
    with bytes_kept(model):
        model.merge_adapter()
        model.unmerge_adapter()
        assert changed(model, before)
    assert_untouched(model, before)


def test_only_the_active_adapter_is_merged():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapters, before = Adapters(model), state(model)
    for name in ("default", "other", None):
        with adapters.under(name):
            expected = logits(model)
            with merged_meanwhile(model):
                torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
                assert bool(changed(model, before)) == (name is not None)
    assert_untouched(model, before)


def test_an_error_meanwhile_leaves_nothing_behind():
    model = adapted(torch.bfloat16)
    before, expected = state(model), logits(model)
    with pytest.raises(KeyboardInterrupt), merged_meanwhile(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    assert torch.equal(logits(model), expected)


def test_a_weight_with_two_names_keeps_its_adapter():
    model = adapted(tied=True, target_modules=["q_proj", "embed_tokens"])
    before, expected = state(model), logits(model)
    with merged_meanwhile(model):
        assert {name.split(".")[-3] for name in changed(model, before)} == {"q_proj"}
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_cannot_be_merged_stays_an_adapter():
    """A bias of the adapter needs one to be merged into; by then weights of the layer are changed already."""
    model = adapted(lora_bias=True)
    before, expected = state(model), logits(model)
    with merged_meanwhile(model):
        assert not changed(model, before)
        assert torch.equal(logits(model), expected)
    assert_untouched(model, before)


def test_weights_in_four_bits_keep_their_adapter(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    before = state(model)
    with merged_meanwhile(model):
        assert not changed(model, before)


def test_a_model_without_an_adapter():
    model = tiny("llama")
    before = state(model)
    with merged_meanwhile(model):
        assert not changed(model, before)
