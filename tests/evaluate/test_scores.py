"""Which answers are scored, and what becomes of those that a source says nothing of."""

from __future__ import annotations

import pytest

from alignctl.evaluate.evaluator import Evaluation
from alignctl.evaluate.held_out import Questions
from alignctl.evaluate.scores import why_not_scored
from alignctl.rollout.rewards import FunctionReward
from alignctl.rollout.scoring import Scoring
from alignctl.rollout.settings import RewardSettings

pytestmark = pytest.mark.train


def right(completions, answer):
    return [float(one == known) for one, known in zip(completions, answer, strict=True)]


def test_rows_without_a_column_that_is_asked_for_are_not_scored():
    scoring = Scoring(RewardSettings(), [FunctionReward(right, "right")], None)
    asked = {"texts": ["1 + 1?"], "prompts": [[1]], "given": ["1 + 1?"]}
    assert why_not_scored(scoring, Questions(**asked, columns={"answer": ["2"]})) is None
    assert "`right` asks for `answer`" in why_not_scored(scoring, Questions(**asked))


def test_mean_and_deviation_are_of_the_scores_that_there_are():
    evaluation = Evaluation()
    evaluation.add_scores("rewards/a", [1.0, 3.0])
    evaluation.add_scores("rewards/b", [1.0, None, 5.0])
    evaluation.add_scores("rewards/c", [None, None])
    assert evaluation.metrics == {"rewards/a": 2, "rewards/a_std": 1, "rewards/b": 3, "rewards/b_std": 2}
    assert evaluation.values == {"rewards/a": [1.0, 3.0]}
    assert evaluation.counts == {"rewards/b": 2}
