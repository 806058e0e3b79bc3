"""Completion log-probabilities equal those of the full logits, whatever the architecture does after its LM head."""

import pytest
from support.models import tiny

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[14, 15], [16, 17, 18, 19], [20]]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma2", {"final_logit_softcapping": 1.0}),  # caps so low that it shows
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_equals_full_logits(model_type, options):
    from alignctl.engine.logps import completion_logps

    model = tiny(model_type, **options)
    found = completion_logps(model, PROMPTS, COMPLETIONS, batch_size=2)
    for prompt, completion, logps in zip(PROMPTS, COMPLETIONS, found, strict=True):
        row = torch.tensor([prompt + completion])
        with torch.no_grad():
            full = model(row).logits[0].double().log_softmax(-1)
        expected = torch.stack([full[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])
        # float32 noise of another batch shape
        torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)


def test_adapters_count_and_can_be_switched_off():
    from peft import LoraConfig, get_peft_model

    from alignctl.engine.logps import completion_logps

    base = completion_logps(tiny("llama"), PROMPTS, COMPLETIONS, batch_size=4)
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted = completion_logps(model, PROMPTS, COMPLETIONS, batch_size=4)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(adapted, base, strict=True))
    with model.disable_adapter():
        for off, b in zip(completion_logps(model, PROMPTS, COMPLETIONS, batch_size=4), base, strict=True):
            torch.testing.assert_close(off, b)


def test_an_empty_completion_has_no_logps():
    from alignctl.engine.logps import completion_logps

    (logps,) = completion_logps(tiny("llama"), [[1, 2]], [[]], batch_size=1)
    assert logps.shape == (0,)


def test_the_real_model_gives_its_published_loss(shared_data):
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignctl.engine.logps import completion_logps

    folder = shared_data / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cases = reference["token_loss_fp32_cpu"]
    assert len(cases) >= 5
    for case in cases:
        ids = tokenizer(case["text"])["input_ids"]
        (logps,) = completion_logps(model, [ids[:1]], [ids[1:]], batch_size=1)
        assert len(logps) == case["n_predicted_tokens"]
        assert -float(logps.sum()) == pytest.approx(case["sum_nll"], abs=1e-2)  # published with 3 to 4 decimals
