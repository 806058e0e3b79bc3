"""Which models take packed rows, and that the others stay as they were."""

import pytest
from support.models import SIZE, tiny

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
}  # fmt: skip


def build(model_type, **options):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_config(config)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "granite", "olmo2", "gpt2"])
def test_models_that_take_packed_rows(model_type):
    from alignctl.models.packing import put_packed_attention_on

    options = {"sliding_window": None} if model_type == "mistral" else {}
    if model_type == "gpt2":
        options |= {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = build(model_type, **SIZE | options)
    assert put_packed_attention_on(model, torch.device("cpu")) is None
    assert model.packed_attention == "sdpa"
    assert put_packed_attention_on(model, torch.device("cpu")) is None  # once more changes nothing


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mistral", {**SIZE, "sliding_window": 16}, "look at a window of 16 tokens"),
        ("gemma3_text", SIZE, "have layers that do not look at the whole text"),
        ("mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}, "cannot be replaced"),
        ("gemma3", {"text_config": SIZE, "vision_config": VISION}, "are not for text alone"),
        ("llama", {**SIZE, "attn_implementation": "eager"}, "the attention of this model is `eager`"),
        # its positions come from the attention mask, and not from position ids
        ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "cannot be replaced"),
    ],
    ids=["window", "local layers", "recurrent", "multimodal", "another attention", "alibi"],
)
def test_models_that_do_not(model_type, options, reason):
    from alignctl.models.packing import put_packed_attention_on

    model = build(model_type, **options)
    before = model.config._attn_implementation
    assert reason in put_packed_attention_on(model, torch.device("cpu"))
    assert model.config._attn_implementation == before


def test_a_model_that_computes_something_else_is_found_out(monkeypatch):
    """What no table says shows when three short sequences are run packed and by themselves."""
    from alignctl.models.packing import put_packed_attention_on

    model = build("llama", **SIZE)
    monkeypatch.setattr(model.model.rotary_emb.__class__, "forward", looks_at_the_row)
    assert "do not compute packed rows as they do single ones" in put_packed_attention_on(model, torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"


def looks_at_the_row(self, x, position_ids):
    """Rotary embeddings of the places in the row, whatever the position ids say."""
    angles = torch.outer(torch.arange(x.size(1)).float(), self.inv_freq)
    both = torch.cat([angles, angles], -1)[None]
    return both.cos(), both.sin()


def test_generation_and_saving_do_not_notice(tmp_path):
    import json

    from alignctl.models.packing import put_packed_attention_on

    plain, model = build("llama", **SIZE), build("llama", **SIZE)
    put_packed_attention_on(model, torch.device("cpu"))
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.save_pretrained(tmp_path)
    assert "alignctl" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_every_kernel_has_a_name_that_transformers_takes():
    """It looks for packages of its own where a name has `flash` in it; padded rows are computed as by SDPA."""
    from alignctl.models.packing import _NAMES

    model, ids = tiny(), torch.arange(4, 24)[None]
    expected = model(input_ids=ids).logits
    for name in _NAMES.values():
        model.set_attn_implementation(name)
        assert torch.equal(model(input_ids=ids).logits, expected)
