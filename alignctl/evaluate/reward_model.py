"""The numbers about a reward model: what it thinks of pairs, and how its scores are distributed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from transformers import PreTrainedModel

from alignctl.engine.forward import evaluating
from alignctl.engine.rewards import sequence_scores
from alignctl.evaluate.held_out import Pairs
from alignctl.evaluate.measure import check_finite


@dataclass(frozen=True)
class RewardStatistics:
    """How a reward model scores; a stage that uses it can make its rewards comparable: (reward - mean) / std."""

    mean: float
    std: float
    answers: int
    """Chosen and rejected completions that were scored."""


def accuracy_and_margin(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> dict[str, float]:
    """Whether, and by how much, the chosen completions score higher: what `Evaluator.measure_reward_model` names."""
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
        scores = sequence_scores(model, prompts, completions, batch_size)
    check_finite(scores, "scores of completions")
    return scores
