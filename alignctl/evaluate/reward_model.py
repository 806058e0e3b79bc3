"""The numbers about a reward model: what it thinks of pairs, and how its scores are distributed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from transformers import PreTrainedModel

from alignctl.data.tokenizing import Answer
from alignctl.engine.forward import evaluating
from alignctl.engine.rewards import sequence_scores
from alignctl.evaluate.held_out import Pairs
from alignctl.evaluate.measure import check_finite, length
from alignctl.evaluate.sharing import shared_out


@dataclass(frozen=True)
class RewardStatistics:
    """How a reward model scores; a stage that uses it can make its rewards comparable: (reward - mean) / std."""

    mean: float
    std: float
    answers: int
    """Chosen and rejected completions that were scored."""


def margins(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> list[float]:
    """By how much the chosen completion of each pair scores higher."""
    return [chosen - rejected for chosen, rejected in _scores(model, pairs, batch_size)]


def reward_statistics(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> RewardStatistics:
    """Mean and standard deviation of the scores of all completions of some pairs."""
    scores = [score for pair in _scores(model, pairs, batch_size) for score in pair]
    return RewardStatistics(statistics.fmean(scores), statistics.pstdev(scores), len(scores))


def _scores(model: PreTrainedModel, pairs: Pairs, batch_size: int) -> list[tuple[float, float]]:
    """Scores of the chosen and the rejected completion of each pair."""

    def of_pairs(own: list[tuple[Answer, Answer]]) -> list[tuple[float, float]]:
        prompts, completions = zip(*(answer for pair in own for answer in pair), strict=True)
        scores = sequence_scores(model, prompts, completions, batch_size)
        return list(zip(scores[::2], scores[1::2], strict=True))

    with evaluating(model):
        both = list(zip(pairs.chosen, pairs.rejected, strict=True))
        found = shared_out(model, both, lambda pair: sum(map(length, pair)), of_pairs)
    check_finite([score for pair in found for score in pair], "scores of completions")
    return found
