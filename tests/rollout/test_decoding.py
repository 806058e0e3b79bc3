"""A cache of a fixed size changes no token, and is left alone where a model knows none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignctl.rollout.decoding import Sampling, _Batch, decode, why_not_fixed
from alignctl.rollout.drawing import _by_generate, _nothing_else, as_drawn, draw_completions, why_cache_grows
from alignctl.rollout.settings import RolloutSettings

pytestmark = pytest.mark.train

ENDS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
WINDOW = {"sliding_window": 8}  # shorter than what is drawn
KINDS = [
    ("llama", {}),
    ("gemma3_text", WINDOW),
    ("gpt2", {}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ("mistral", WINDOW), ("gemma", {}), ("gemma2", WINDOW), ("qwen2", {}), ("qwen3", {}), ("phi3", {}),
    ("gpt_neox", {}), ("opt", {}), ("olmo2", {}), ("olmo3", WINDOW), ("granite", {}), ("cohere2", WINDOW),
    ("smollm3", {}), ("starcoder2", WINDOW), ("mixtral", {"num_local_experts": 4}), ("glm4", {}),
    ("gpt_oss", WINDOW | {"num_local_experts": 4}), ("stablelm", {}), ("exaone4", WINDOW),
]  # fmt: skip

SEEDS = range(64)


def prompts(vocabulary, lengths=(3, 17, 9, 30)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def both(model, texts, sampling):
    """What is drawn from the same random numbers over a cache that grows, and over a fixed one."""
    for draw in (_by_generate, decode):
        sampling = replace(sampling, seeds=sampling.seeds[: len(texts)])
        with _nothing_else(model), torch.no_grad():
            yield as_drawn(draw(model, texts, sampling), sampling.ends)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_it_changes_no_token(kind, options):
    """Also none that is drawn at random: at temperature 1 a difference in the last digit would show sooner or later."""
    model = tiny(kind, **ENDS, **options)
    assert why_not_fixed(model) is None
    growing, fixed = both(model, prompts(64), Sampling(1.0, 24, [2], [5, 6], 0, SEEDS))
    assert fixed == growing
    assert not {5, 6} & {token for completion in fixed.completions for token in completion}


@pytest.fixture
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_pretrained_model_says_the_same_while_others_end(stories):
    """Every third token ends one of 16 completions here, so that the batch is divided again and again. At a
    temperature near 0 nothing is left to chance."""
    model, _ = stories
    texts = prompts(512, range(5, 37, 2))
    ends = list(range(3, 512, 20))
    growing, fixed = both(model, texts, Sampling(1e-3, 48, ends, [], 0, SEEDS))
    assert fixed == growing
    assert len({len(one) for one in fixed.completions}) > 3
    assert 48 in map(len, fixed.completions)


def test_it_takes_the_precision_of_autocast(stories):
    """Keys come out of rotary embeddings in float32 there, values in bfloat16."""
    model, _ = stories
    with torch.autocast("cpu", torch.bfloat16):
        growing, fixed = both(model, prompts(512), Sampling(1e-3, 32, [2], [], 0, SEEDS))
    assert fixed == growing


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "bloom"])
def test_a_model_that_knows_none_is_drawn_from_all_the_same(stories, kind):
    options = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    model = tiny(kind, **ENDS, **options | {"vocab_size": 512})
    assert f"models of type `{kind}`" in why_cache_grows(model)
    drawn = draw_completions(model, stories[1], prompts(512), RolloutSettings(response_length=8), SEEDS)
    assert all(len(one) == 8 for one, ended in zip(drawn.completions, drawn.ended, strict=True) if not ended)


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gemma3_text", WINDOW)])
def test_a_step_looks_at_no_number(kind, options):
    """Else it could not be recorded on a GPU: tensors without numbers stand for one that is being recorded."""
    with FakeTensorMode(), torch.no_grad():
        model = tiny(kind, **ENDS, **options)
        batch = _Batch(model, [[3, 4, 5], [6, 7]], pad_id=0, room=4)
        for _ in range(3):
            batch.go_on(torch.full((2,), 5))
        assert batch.logits.shape == (2, 64)
