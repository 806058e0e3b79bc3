"""Measures a reward model on held-out pairs, and how its scores are distributed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from alignctl.data.tokenizing import Answer
from alignctl.engine.forward import bare, last_hidden, passes, takes_packed_rows
from alignctl.evaluate.held_out import Pairs

REWARD_STATISTICS = "reward_statistics.json"
"""File beside the weights of a reward model, with its `RewardStatistics`."""


@dataclass(frozen=True)
class RewardStatistics:
    """How a reward model scores; a stage that uses it can make its rewards comparable: (reward - mean) / std."""

    mean: float
    std: float
    answers: int
    """Chosen and rejected completions that were scored."""


@torch.no_grad()
def score(model: PreTrainedModel, answers: Sequence[Answer], batch_size: int) -> list[float]:
    """The model's score of each answer; its mode is left as it is.

    Args:
        model: A sequence classifier with one output and a pad token, or one wrapped by peft.
        batch_size: Answers per forward pass, if all were as long as the longest.
    """
    pad_id = bare(model).config.get_text_config().pad_token_id
    prompts, completions = zip(*answers, strict=True)
    scores = [0.0] * len(answers)
    for members, layout in passes(model, prompts, completions, batch_size, pad_id):
        if takes_packed_rows(model):
            last = [_last(answers[index], pad_id) for index in members]
            where = layout.where[torch.arange(len(members)), torch.tensor(last)]
            logits = bare(model).score(last_hidden(model, layout)[where])
        else:
            logits = model(**layout.inputs, use_cache=False).logits
        for index, value in zip(members, logits[:, 0].float().tolist(), strict=True):
            scores[index] = value
    return scores


def _last(answer: Answer, pad_id: int) -> int:
    """Where an answer is scored, as transformers does it: its last token that is not the padding's, which some
    tokenizers write at the end, too."""
    row = answer.prompt + answer.completion
    return max((position for position, token in enumerate(row) if token != pad_id), default=0)


def measure_reward_model(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> dict[str, float]:
    """Scores pairs. Metrics:

    - accuracy: share of pairs whose chosen completion has the higher score, in [0, 1];
    - margin: mean difference of the scores.
    """
    scores = _scores(model, pairs, batch_size)
    margins = [c - r for c, r in zip(scores[: len(pairs.chosen)], scores[len(pairs.chosen) :], strict=True)]
    return {"accuracy": sum(margin > 0 for margin in margins) / len(margins), "margin": statistics.fmean(margins)}


def reward_statistics(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> RewardStatistics:
    """Mean and standard deviation of the scores of all completions of some pairs."""
    scores = _scores(model, pairs, batch_size)
    return RewardStatistics(statistics.fmean(scores), statistics.pstdev(scores), len(scores))


def _scores(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> list[float]:
    """Scores of the chosen completions, then of the rejected ones."""
    was_training = model.training
    model.eval()
    try:
        return score(model, [*pairs.chosen, *pairs.rejected], batch_size)
    finally:
        model.train(was_training)
