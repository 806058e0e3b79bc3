"""Measures models on held-out rows. Knows no trainer and no run: a stage uses it, and so can a command."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.engine.forward import evaluating
from alignctl.evaluate.answers import draw_answers
from alignctl.evaluate.held_out import HeldOut, Questions
from alignctl.evaluate.judges import Judge
from alignctl.evaluate.measure import fraction, kl_of_answers, label_auc, preferences
from alignctl.evaluate.reference import Reference
from alignctl.evaluate.reward_model import accuracy_and_margin


@dataclass
class Evaluation:
    """What was measured of one model."""

    metrics: dict[str, float] = field(default_factory=dict)
    completions: list[str] = field(default_factory=list)
    """Drawn answers to the questions."""


@dataclass(frozen=True)
class Evaluator:
    """Measures any number of models in the same way, on the same rows."""

    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOut
    judge: Judge | None
    """None where nobody says which answers are right."""
    settings: EvalSettings
    seed: int
    """Of the drawing."""

    def measure(self, policy: PreTrainedModel, reference: Reference | None = None) -> Evaluation:
        """Measures a policy. Metrics, each in [0, 1] unless said otherwise:

        - preference_accuracy: fraction of pairs whose chosen completion the policy gives the higher log-probability.
        - preference_accuracy_per_token: the same with log-probabilities divided by the number of tokens, SimPO's reward
          (arXiv:2405.14734, Eq. 3): sums mostly say which completion is shorter where lengths differ much.
        - reward_accuracy: the same with the implicit reward, log-probability less the reference's (DPO, Sec. 5).
        - label_auc: chance that a wanted answer has a higher implicit reward than an unwanted one, a tie counting half.
        - right, wanted_manner: fractions of the drawn answers, by the judge.
        - kl: KL divergence from the reference in nats per answer, estimated on the drawn answers (see `estimate_kl`).
        - answer_tokens: mean length of the drawn answers.

        Args:
            reference: None where there is none to compare with; then neither implicit reward nor KL are measured.
        """
        held, batch_size = self.held_out, self.settings.batch_size
        evaluation = Evaluation()
        with evaluating(policy):
            if held.pairs is not None:
                evaluation.metrics |= preferences(policy, reference, held.pairs, batch_size)
            if held.feedback is not None and reference is not None:
                evaluation.metrics["label_auc"] = label_auc(policy, reference, held.feedback, batch_size)
            if held.questions is not None:
                self._ask(evaluation, policy, reference, held.questions)
        return evaluation

    def measure_reward_model(self, model: PreTrainedModel) -> Evaluation:
        """Measures a reward model. Metrics, where there are pairs:

        - accuracy: fraction of pairs whose chosen completion has the higher score, in [0, 1];
        - margin: mean difference of the scores.
        """
        pairs = self.held_out.pairs
        if pairs is None:
            return Evaluation()
        return Evaluation(accuracy_and_margin(model, pairs, self.settings.batch_size))

    def _ask(
        self, evaluation: Evaluation, policy: PreTrainedModel, reference: Reference | None, questions: Questions
    ) -> None:
        """Has the policy answer, and adds the answers and what they show."""
        settings, metrics = self.settings, evaluation.metrics
        answers = draw_answers(policy, self.tokenizer, questions.prompts, settings, self.seed)
        evaluation.completions = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        metrics["answer_tokens"] = sum(len(answer) for answer in answers) / len(answers)
        if self.judge is not None:
            verdicts = [self.judge(q, a) for q, a in zip(questions.texts, evaluation.completions, strict=True)]
            metrics["right"] = fraction(verdict.right for verdict in verdicts)
            metrics["wanted_manner"] = fraction(verdict.wanted_manner for verdict in verdicts)
        if reference is not None and settings.temperature == 1.0:  # at another the answers are not the policy's samples
            metrics["kl"] = kl_of_answers(policy, reference, questions.prompts, answers, settings.batch_size)
