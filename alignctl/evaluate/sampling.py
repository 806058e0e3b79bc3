"""Samples completions from a policy to measure it, without a trace in the caller's random state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.models.generation import draw_completions


def sample_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    seed: int,
) -> list[list[int]]:
    """One completion for each prompt, token ids with the end-of-sequence token where there is one.

    Args:
        prompts: Token ids.
        seed: Of the sampling.
    """
    if not prompts:
        return []
    budget = settings.batch_size * (max(map(len, prompts)) + settings.max_new_tokens)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = draw_completions(
            policy, tokenizer, prompts, settings.max_new_tokens, settings.temperature, max_tokens=budget
        )
    return drawn.completions
