"""Measures a policy on held-out rows: what it prefers, what it answers, how far it is from its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.data.tokenizing import Answer
from alignctl.engine.logps import completion_logps
from alignctl.evaluate.held_out import Feedback, HeldOut, Pairs, Questions
from alignctl.evaluate.judges import Judge
from alignctl.evaluate.sampling import sample_completions

Reference = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Gives the reference model for the time of a `with` block."""


@dataclass
class Evaluation:
    """What was measured of one policy."""

    metrics: dict[str, float] = field(default_factory=dict)
    completions: list[str] = field(default_factory=list)
    """Sampled answers to the questions."""


def measure(
    policy: PreTrainedModel,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    judge: Judge | None,
    settings: EvalSettings,
    seed: int,
) -> Evaluation:
    """Measures a policy. Metrics, each in [0, 1] unless said otherwise:

    - preference_accuracy: share of pairs whose chosen completion the policy gives the higher log-probability.
    - preference_accuracy_per_token: the same with log-probabilities divided by the number of tokens, SimPO's reward
      (arXiv:2405.14734, Eq. 3): sums mostly say which completion is shorter where lengths differ much.
    - reward_accuracy: the same with the implicit reward, log-probability less the reference's (DPO, Sec. 5).
    - label_auc: chance that a wanted answer has a higher implicit reward than an unwanted one, a tie counting half.
    - right, wanted_manner: shares of sampled answers, by the judge.
    - kl: KL divergence from the reference in nats per answer, estimated on the sampled answers (see `estimate_kl`).
    - answer_tokens: mean length of the sampled answers.

    Args:
        reference: None where there is none to compare with; then neither implicit reward nor KL are measured.
    """
    was_training = policy.training
    policy.eval()
    try:
        evaluation = Evaluation()
        if held_out.pairs is not None:
            evaluation.metrics |= _preferences(policy, reference, held_out.pairs, settings.batch_size)
        if held_out.feedback is not None and reference is not None:
            evaluation.metrics["label_auc"] = _label_auc(policy, reference, held_out.feedback, settings.batch_size)
        if held_out.questions is not None:
            _answers(evaluation, policy, reference, tokenizer, held_out.questions, judge, settings, seed)
        return evaluation
    finally:
        policy.train(was_training)


def estimate_kl(policy_logps: Sequence[Tensor], reference_logps: Sequence[Tensor]) -> float:
    """KL(policy || reference) in nats per completion, from completions sampled from the policy.

    Schulman's k3, `r - 1 - log r` with `r = reference / policy` per token, summed over each completion's tokens and
    averaged over completions: unbiased, and never negative. http://joschu.net/blog/kl-approx.html

    Args:
        policy_logps: Log-probabilities of the sampled tokens under the policy, `[completion length]` each.
        reference_logps: The same under the reference.
    """
    sums = []
    for ours, theirs in zip(policy_logps, reference_logps, strict=True):
        log_ratio = theirs.double() - ours.double()
        sums.append(float((log_ratio.exp() - 1 - log_ratio).sum()))
    return sum(sums) / len(sums)


def _preferences(
    policy: PreTrainedModel, reference: Reference | None, pairs: Pairs, batch_size: int
) -> dict[str, float]:
    answers, count = [*pairs.chosen, *pairs.rejected], len(pairs.chosen)
    logps = _logps(policy, answers, batch_size)
    means = [logp / len(answer.completion) for logp, answer in zip(logps, answers, strict=True)]
    metrics = {
        "preference_accuracy": _share(c > r for c, r in zip(logps[:count], logps[count:], strict=True)),
        "preference_accuracy_per_token": _share(c > r for c, r in zip(means[:count], means[count:], strict=True)),
    }
    if reference is not None:
        rewards = _implicit_rewards(logps, reference, answers, batch_size)
        metrics["reward_accuracy"] = _share(c > r for c, r in zip(rewards[:count], rewards[count:], strict=True))
    return metrics


def _label_auc(policy: PreTrainedModel, reference: Reference, feedback: Feedback, batch_size: int) -> float:
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
    return [float(logps.sum()) for logps in completion_logps(model, prompts, completions, batch_size)]


def _implicit_rewards(
    logps: Sequence[float], reference: Reference, answers: Sequence[Answer], batch_size: int
) -> list[float]:
    """Log-probabilities less the reference's: the reward that DPO and KTO train, up to beta."""
    with reference() as model:
        return [ours - theirs for ours, theirs in zip(logps, _logps(model, answers, batch_size), strict=True)]


def _answers(
    evaluation: Evaluation,
    policy: PreTrainedModel,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    judge: Judge | None,
    settings: EvalSettings,
    seed: int,
) -> None:
    answers = sample_completions(policy, tokenizer, questions.prompts, settings, seed)
    evaluation.completions = tokenizer.batch_decode(answers, skip_special_tokens=True)
    metrics = evaluation.metrics
    metrics["answer_tokens"] = sum(len(answer) for answer in answers) / len(answers)
    if judge is not None:
        verdicts = [judge(q, a) for q, a in zip(questions.texts, evaluation.completions, strict=True)]
        metrics["right"] = _share(verdict.right for verdict in verdicts)
        metrics["wanted_manner"] = _share(verdict.wanted_manner for verdict in verdicts)
    if (
        reference is not None and settings.temperature == 1.0
    ):  # at another temperature the answers are not samples of the policy
        ours = completion_logps(policy, questions.prompts, answers, settings.batch_size)
        with reference() as model:
            theirs = completion_logps(model, questions.prompts, answers, settings.batch_size)
        metrics["kl"] = estimate_kl(ours, theirs)


def _share(facts: Iterable[bool]) -> float:
    facts = [bool(fact) for fact in facts]
    return sum(facts) / len(facts)
