"""Measures a policy on held-out rows: what it prefers, what it answers, how far it is from its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.engine.logps import completion_logps
from alignctl.evaluate.judges import Judge
from alignctl.evaluate.sampling import sample_completions

Reference = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Gives the reference model for the time of a `with` block."""


@dataclass(frozen=True)
class Pairs:
    """Held-out preference pairs as token ids."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]

    def logps(self, model: PreTrainedModel, batch_size: int) -> tuple[list[float], list[float]]:
        """Sequence sums of the chosen and of the rejected completions under a model."""
        both = completion_logps(model, self.prompts * 2, self.chosen + self.rejected, batch_size)
        sums = [float(logps.sum()) for logps in both]
        return sums[: len(self.prompts)], sums[len(self.prompts) :]


@dataclass(frozen=True)
class Questions:
    """Held-out prompts to answer."""

    texts: list[str]
    """The last user message, or the whole prompt where it is plain text: what a judge is shown."""
    prompts: list[list[int]]
    """Token ids."""


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
    pairs: Pairs | None,
    questions: Questions | None,
    judge: Judge | None,
    settings: EvalSettings,
    seed: int,
) -> Evaluation:
    """Measures a policy. Metrics, each in [0, 1] unless said otherwise:

    - preference_accuracy: share of pairs whose chosen completion the policy gives the higher log-probability.
    - reward_accuracy: the same for the implicit reward, log-probability less the reference's (DPO, Sec. 5).
    - right, wanted_manner: shares of sampled answers, by the judge.
    - kl: KL divergence from the reference in nats per answer, estimated on the sampled answers (see `estimate_kl`).
    - answer_tokens: mean length of the sampled answers.

    Args:
        reference: None where there is none to compare with; then there is no reward accuracy and no KL.
    """
    was_training = policy.training
    policy.eval()
    try:
        evaluation = Evaluation()
        if pairs is not None:
            evaluation.metrics |= _preferences(policy, reference, pairs, settings)
        if questions is not None:
            _answers(evaluation, policy, reference, tokenizer, questions, judge, settings, seed)
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
    policy: PreTrainedModel, reference: Reference | None, pairs: Pairs, settings: EvalSettings
) -> dict[str, float]:
    chosen, rejected = pairs.logps(policy, settings.batch_size)
    metrics = {"preference_accuracy": _share(c > r for c, r in zip(chosen, rejected, strict=True))}
    if reference is not None:
        with reference() as model:
            ref_chosen, ref_rejected = pairs.logps(model, settings.batch_size)
        rewards = zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
        metrics["reward_accuracy"] = _share(c - rc > r - rr for c, r, rc, rr in rewards)
    return metrics


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
