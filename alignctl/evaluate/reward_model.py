"""Measures a reward model on held-out pairs, and how its scores are distributed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from transformers import PreTrainedModel

from alignctl.engine.forward import evaluating
from alignctl.engine.rewards import sequence_scores
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
    with evaluating(model):
        prompts, completions = zip(*pairs.chosen, *pairs.rejected, strict=True)
        return sequence_scores(model, prompts, completions, batch_size)
