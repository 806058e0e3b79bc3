"""Measures models on held-out rows. Knows no trainer and no run: a stage uses it, and so can a command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.engine.forward import evaluating
from alignctl.engine.tensor_parallel import place_among_rows
from alignctl.engine.watched import watched
from alignctl.evaluate.answers import draw_answers
from alignctl.evaluate.held_out import HeldOut, Questions
from alignctl.evaluate.judges import Judge
from alignctl.evaluate.measure import kl_of_answers, label_auc, preferences
from alignctl.evaluate.reference import Reference
from alignctl.evaluate.reward_model import margins
from alignctl.evaluate.scores import scores_of_answers
from alignctl.rollout.scoring import Scoring


@dataclass
class Evaluation:
    """What was measured of one model."""

    metrics: dict[str, float] = field(default_factory=dict)
    completions: list[str] = field(default_factory=list)
    """Drawn answers to the questions."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Of the metrics that are means over rows or answers: what each of these has, in the same order in every
    evaluation."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of the other metrics: how many rows they are of."""
    adds: dict[str, list[float]] = field(default_factory=dict)
    """Of those that are sums over batches: what each of these adds."""
    batches: list[int] = field(default_factory=list)
    """Rows of these batches, and processes that shared them: the same in evaluations whose batches are the same."""

    def add(self, name: str, values: Iterable[float]) -> None:
        """Adds a metric that is the mean of what is found of each row or answer."""
        self.values[name] = list(map(float, values))
        self.metrics[name] = fmean(self.values[name])

    def add_scores(self, name: str, scores: Sequence[float | None]) -> None:
        """Adds mean and deviation of the scores that there are."""
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            self.add(name, known)
        elif known:
            self.add_whole({name: fmean(known)}, {name: len(known)})
        if known:
            self.metrics[f"{name}_std"] = pstdev(known)

    def add_whole(self, metrics: dict[str, float], counts: dict[str, int]) -> None:
        """Adds metrics that are no means over rows, and how many rows each is of."""
        self.metrics |= metrics
        self.counts |= counts


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
    scoring: Scoring | None = None
    """What scores answers besides; None where nothing does."""
    begins: Callable[[str, int, str], None] = lambda part, total, unit: None
    """Is told what is measured now, and how many of which unit this process is going to count."""
    count: Callable[[int], None] = lambda more: None
    """Is told of more of them."""

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
        - rewards/NAME, rewards/NAME_std: mean and deviation of what a source of `scoring` says of the drawn answers.

        Args:
            reference: None where there is none to compare with; then neither implicit reward nor KL are measured.
        """
        held, batch_size = self.held_out, self.settings.batch_size
        evaluation = Evaluation()
        with evaluating(policy), watched(self.count):
            if held.pairs is not None:
                self._begins("preferences", policy, 2 * len(held.pairs.chosen), reference)
                for name, values in preferences(policy, reference, held.pairs, batch_size).items():
                    evaluation.add(name, values)
            if held.feedback is not None and reference is not None:
                self._begins("labels", policy, len(held.feedback.labels), reference)
                auc = label_auc(policy, reference, held.feedback, batch_size)
                evaluation.add_whole({"label_auc": auc}, {"label_auc": len(held.feedback.labels)})
            if held.questions is not None:
                self._ask(evaluation, policy, reference, held.questions)
        return evaluation

    def measure_reward_model(self, model: PreTrainedModel) -> Evaluation:
        """Measures a reward model. Metrics, where there are pairs:

        - accuracy: fraction of pairs whose chosen completion has the higher score, in [0, 1];
        - margin: mean difference of the scores.
        """
        pairs, evaluation = self.held_out.pairs, Evaluation()
        if pairs is not None:
            self._begins("preferences", model, 2 * len(pairs.chosen))
            with watched(self.count):
                found = margins(model, pairs, self.settings.batch_size)
            evaluation.add("accuracy", (margin > 0 for margin in found))
            evaluation.add("margin", found)
        return evaluation

    def _begins(
        self, part: str, model: nn.Module, total: int, reference: Reference | None = None, unit: str = "completions"
    ) -> None:
        """Tells what is measured now: so many of all processes, by the model, and the reference where it is asked."""
        processes, _ = place_among_rows(model)
        self.begins(part, -(-total // processes) * (1 if reference is None else 2), unit)

    def _ask(
        self, evaluation: Evaluation, policy: PreTrainedModel, reference: Reference | None, questions: Questions
    ) -> None:
        """Has the policy answer, and adds the answers and what they show."""
        settings = self.settings
        self._begins("answers", policy, len(questions.prompts), unit="answers")
        answers = draw_answers(policy, self.tokenizer, questions.prompts, settings, self.seed)
        evaluation.completions = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        evaluation.add("answer_tokens", map(len, answers))
        if self.judge is not None:
            verdicts = [self.judge(q, a) for q, a in zip(questions.texts, evaluation.completions, strict=True)]
            evaluation.add("right", (verdict.right for verdict in verdicts))
            evaluation.add("wanted_manner", (verdict.wanted_manner for verdict in verdicts))
        if self.scoring is not None:
            self._begins("scores", policy, len(answers), unit="answers")
            for name, scores in scores_of_answers(policy, self.tokenizer, questions, answers, self.scoring).items():
                evaluation.add_scores(f"rewards/{name}", scores)
        if reference is not None and settings.temperature == 1.0:  # at another the answers are not the policy's samples
            self._begins("KL", policy, len(answers), reference)
            evaluation.add("kl", kl_of_answers(policy, reference, questions.prompts, answers, settings.batch_size))
