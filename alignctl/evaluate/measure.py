"""The numbers about a policy: what it prefers, and how far it is from its reference. Evaluator puts them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel

from alignctl.data.tokenizing import Answer
from alignctl.engine.logps import completion_logps
from alignctl.errors import NotANumber
from alignctl.evaluate.held_out import Feedback, Pairs
from alignctl.evaluate.reference import Reference
from alignctl.rollout.kl import kl_estimates


def estimate_kl(policy_logps: Sequence[Tensor], reference_logps: Sequence[Tensor]) -> float:
    """KL(policy || reference) in nats per completion, from completions drawn from the policy.

    Schulman's k3, summed over each completion's tokens and averaged over completions: unbiased, and never negative.

    Args:
        policy_logps: Log-probabilities of the drawn tokens under the policy, `[completion length]` each.
        reference_logps: The same under the reference.
    """
    sums = []
    for ours, theirs in zip(policy_logps, reference_logps, strict=True):
        sums.append(float(kl_estimates(ours.double(), theirs.double(), "k3").sum()))
    return sum(sums) / len(sums)


def kl_of_answers(
    policy: PreTrainedModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
) -> float:
    """KL from the reference in nats per answer, on answers that were drawn from the policy at temperature 1.

    Args:
        prompts: Token ids.
        answers: Token ids, one for each prompt.
    """
    ours = completion_logps(policy, prompts, answers, batch_size)
    with reference() as model:
        theirs = completion_logps(model, prompts, answers, batch_size)
    return estimate_kl(ours, theirs)


def preferences(
    policy: PreTrainedModel, reference: Reference | None, pairs: Pairs, batch_size: int
) -> dict[str, float]:
    """Whether the chosen completions are the likelier ones: the accuracies that `Evaluator.measure` names."""
    answers, count = [*pairs.chosen, *pairs.rejected], len(pairs.chosen)
    logps = _logps(policy, answers, batch_size)
    means = [logp / len(answer.completion) for logp, answer in zip(logps, answers, strict=True)]
    metrics = {
        "preference_accuracy": fraction(c > r for c, r in zip(logps[:count], logps[count:], strict=True)),
        "preference_accuracy_per_token": fraction(c > r for c, r in zip(means[:count], means[count:], strict=True)),
    }
    if reference is not None:
        rewards = _implicit_rewards(logps, reference, answers, batch_size)
        metrics["reward_accuracy"] = fraction(c > r for c, r in zip(rewards[:count], rewards[count:], strict=True))
    return metrics


def label_auc(policy: PreTrainedModel, reference: Reference, feedback: Feedback, batch_size: int) -> float:
    """How well the implicit reward tells wanted answers from unwanted ones, in [0, 1]."""
    logps = _logps(policy, feedback.answers, batch_size)
    rewards = _implicit_rewards(logps, reference, feedback.answers, batch_size)
    return area_under_curve(rewards, feedback.labels)


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a score with a true label is above one with a false label, a tie counting half; 0.5 where there are
    not both. By ranks, so `n log n` (Mann and Whitney 1947)."""
    true, false = sum(labels), len(labels) - sum(labels)
    if not true or not false:
        return 0.5
    ranked = sorted(zip(scores, labels, strict=True))
    rank_sum, start = 0.0, 0
    for _, group in groupby(ranked, key=lambda item: item[0]):
        tied = [label for _, label in group]
        rank_sum += sum(tied) * (start + (len(tied) + 1) / 2)
        start += len(tied)
    return (rank_sum - true * (true + 1) / 2) / (true * false)


def _logps(model: PreTrainedModel, answers: Sequence[Answer], batch_size: int) -> list[float]:
    """Sequence sums of answers under a model."""
    prompts, completions = zip(*answers, strict=True)
    sums = [float(logps.sum()) for logps in completion_logps(model, prompts, completions, batch_size)]
    check_finite(sums, "log-probabilities of held-out completions")
    return sums


def _implicit_rewards(
    logps: Sequence[float], reference: Reference, answers: Sequence[Answer], batch_size: int
) -> list[float]:
    """Log-probabilities less the reference's: the reward that DPO and KTO train, up to beta."""
    with reference() as model:
        return [ours - theirs for ours, theirs in zip(logps, _logps(model, answers, batch_size), strict=True)]


def check_finite(values: Iterable[float], what: str) -> None:
    """Whether values are numbers that can be compared: NaN is neither above nor below another.

    Raises:
        NotANumber: One is not.
    """
    if not all(map(math.isfinite, values)):
        raise NotANumber(f"{what} are not finite")


def fraction(facts: Iterable[bool]) -> float:
    """How much of something is so, in [0, 1]."""
    facts = [bool(fact) for fact in facts]
    return sum(facts) / len(facts)
