"""Draws answers from a policy to measure it, without a trace in the caller's random state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.rollout.drawing import draw_completions
from alignctl.rollout.settings import RolloutSettings


def draw_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    seed: int,
) -> list[list[int]]:
    """One completion for each prompt, token ids with the end-of-sequence token where there is one.

    Args:
        prompts: Token ids.
        seed: Of the drawing.
    """
    if not prompts:
        return []
    budget = settings.batch_size * (max(map(len, prompts)) + settings.max_new_tokens)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawing = RolloutSettings(
            response_length=settings.max_new_tokens, temperature=settings.temperature, rollout_tokens=budget
        )
        return draw_completions(policy, tokenizer, prompts, drawing).completions
