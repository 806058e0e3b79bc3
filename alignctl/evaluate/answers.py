"""Draws answers from a policy to measure it: the same ones however many processes share them out."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.evaluate.sharing import shared_out
from alignctl.rollout.drawing import draw_completions
from alignctl.rollout.settings import RolloutSettings
from alignctl.rollout.streams import seed_of


def draw_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    seed: int,
) -> list[list[int]]:
    """One completion for each prompt, token ids with the end-of-sequence token where there is one.

    Args:
        prompts: Token ids, one at least.
        seed: Of the drawing; each answer has a random stream of its own.
    """
    budget = settings.batch_size * (max(map(len, prompts)) + settings.max_new_tokens)
    drawing = RolloutSettings(
        response_length=settings.max_new_tokens, temperature=settings.temperature, rollout_tokens=budget
    )

    def draw(own: list[tuple[int, Sequence[int]]]) -> list[list[int]]:
        numbers, asked = zip(*own, strict=True)
        return draw_completions(policy, tokenizer, asked, drawing, [seed_of(seed, one) for one in numbers]).completions

    return shared_out(policy, list(enumerate(prompts)), lambda row: len(row[1]), draw)
