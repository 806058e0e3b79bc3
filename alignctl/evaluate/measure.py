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
from alignctl.evaluate.sharing import shared_out
from alignctl.rollout.kl import kl_estimates

_LOGPS = "log-probabilities of held-out completions"


def estimate_kl(policy_logps: Sequence[Tensor], reference_logps: Sequence[Tensor]) -> list[float]:
    """KL(policy || reference) in nats, of each of the completions drawn from the policy.

    Schulman's k3, summed over a completion's tokens: their mean over completions is unbiased, and never negative.

    Args:
        policy_logps: Log-probabilities of the drawn tokens under the policy, `[completion length]` each.
        reference_logps: The same under the reference.
    """
    return [
        float(kl_estimates(ours.double(), theirs.double(), "k3").sum())
        for ours, theirs in zip(policy_logps, reference_logps, strict=True)
    ]


def kl_of_answers(
    policy: PreTrainedModel,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
) -> list[float]:
    """KL from the reference in nats, of each of the answers, which were drawn from the policy at temperature 1.

    Args:
        prompts: Token ids.
        answers: Token ids, one for each prompt.
    """

    def of_each(rows: list[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        ours = completion_logps(policy, *zip(*rows, strict=True), batch_size)
        with reference() as model:
            theirs = completion_logps(model, *zip(*rows, strict=True), batch_size)
        return estimate_kl(ours, theirs)

    return shared_out(policy, list(zip(prompts, answers, strict=True)), lambda row: sum(map(len, row)), of_each)


def preferences(
    policy: PreTrainedModel, reference: Reference | None, pairs: Pairs, batch_size: int
) -> dict[str, list[bool]]:
    """Whether the chosen completion of each pair is the likelier one, as the accuracies that `Evaluator.measure` names
    count it."""
    both = list(zip(pairs.chosen, pairs.rejected, strict=True))
    logps = _logps_of_pairs(policy, both, batch_size)
    means = [[x / len(a.completion) for x, a in zip(*pair, strict=True)] for pair in zip(logps, both, strict=True)]
    found = {
        "preference_accuracy": [c > r for c, r in logps],
        "preference_accuracy_per_token": [c > r for c, r in means],
    }
    if reference is not None:
        with reference() as model:
            theirs = _logps_of_pairs(model, both, batch_size)
        rewards = [(c - ref_c, r - ref_r) for (c, r), (ref_c, ref_r) in zip(logps, theirs, strict=True)]
        found["reward_accuracy"] = [c > r for c, r in rewards]
    return found


def label_auc(policy: PreTrainedModel, reference: Reference, feedback: Feedback, batch_size: int) -> float:
    """How well the implicit reward tells wanted answers from unwanted ones, in [0, 1]."""
    logps = _logps(policy, feedback.answers, batch_size)
    with reference() as model:
        theirs = _logps(model, feedback.answers, batch_size)
    return area_under_curve([ours - ref for ours, ref in zip(logps, theirs, strict=True)], feedback.labels)


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


def length(answer: Answer) -> int:
    """Tokens of a prompt with its completion."""
    return len(answer.prompt) + len(answer.completion)


def _logps_of_pairs(
    model: PreTrainedModel, pairs: Sequence[tuple[Answer, Answer]], batch_size: int
) -> list[tuple[float, float]]:
    """Sequence sums of chosen and rejected answers under a model."""

    def of_pairs(own: list[tuple[Answer, Answer]]) -> list[tuple[float, float]]:
        sums = _own_logps(model, [answer for pair in own for answer in pair], batch_size)
        return list(zip(sums[::2], sums[1::2], strict=True))

    found = shared_out(model, pairs, lambda pair: sum(map(length, pair)), of_pairs)
    check_finite([value for pair in found for value in pair], _LOGPS)
    return found


def _logps(model: PreTrainedModel, answers: Sequence[Answer], batch_size: int) -> list[float]:
    """Sequence sums of answers under a model."""
    found = shared_out(model, answers, length, lambda own: _own_logps(model, own, batch_size))
    check_finite(found, _LOGPS)
    return found


def _own_logps(model: PreTrainedModel, answers: Sequence[Answer], batch_size: int) -> list[float]:
    prompts, completions = zip(*answers, strict=True)
    return [float(logps.sum()) for logps in completion_logps(model, prompts, completions, batch_size)]


def check_finite(values: Iterable[float], what: str) -> None:
    """Whether values are numbers that can be compared: NaN is neither above nor below another.

    Raises:
        NotANumber: One is not.
    """
    if not all(map(math.isfinite, values)):
        raise NotANumber(f"{what} are not finite")
