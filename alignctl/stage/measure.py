"""What a stage measures before and after training, with the models of its trainer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.config.adapters import changes_base
from alignctl.errors import AlignctlError, NotANumber, RequestError
from alignctl.evaluate.evaluator import Evaluation, Evaluator
from alignctl.evaluate.held_out import Lengths, build_held_out, build_pairs
from alignctl.evaluate.judges import JUDGES
from alignctl.evaluate.measure import check_finite
from alignctl.evaluate.reference import Reference, adapter_off, loaded_beside
from alignctl.evaluate.reward_model import reward_statistics
from alignctl.evaluate.scores import why_not_scored
from alignctl.models.loading import longest_seen
from alignctl.models.sharding import gather_as_run
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json
from alignctl.run.paths import REWARD_STATISTICS
from alignctl.stage.job import Job, rank
from alignctl.stage.ledger import lost_rows
from alignctl.stage.models import load
from alignctl.trainers.base.managed import StageTrainer

_STATISTICS_ROWS = 256
_ANSWER = 128  # tokens of an answer, where nothing says how long it may be


class Measuring(TrainerCallback):
    """Measures the model of a trainer on held-out rows: completions as the trainer sees them, prompts as a policy is
    asked. Before training it does so as training begins, with the model as processes have divided it."""

    before: Evaluation | None = None
    """Before training; kept on disk, so that a run that is continued need not repeat it. None of random weights, which
    are not worth measuring."""

    def __init__(self, job: Job, trainer: StageTrainer):
        self._job, self._trainer = job, trainer
        self._lengths = _lengths(job, trainer)
        asks = job.method.trained == "policy"
        settings = job.stage.eval
        if settings.max_new_tokens is None:
            settings = replace(settings, max_new_tokens=getattr(job.args, "response_length", _ANSWER))
        lost, _ = lost_rows(job.held_rows, trainer.lengths_of.get("eval")) if job.held_rows else ({}, {})
        self.held_out = build_held_out(
            job.held_rows, job.tokenizer, self._lengths, settings.prompts if asks else 0, settings.max_new_tokens, lost
        )
        scoring, questions = trainer.scoring, self.held_out.questions
        if scoring and questions and (reason := why_not_scored(scoring, questions)):
            job.progress.notice(f"answers to held-out prompts are not scored: {reason}")
            scoring = None
        self._evaluator = Evaluator(
            job.tokenizer,
            self.held_out,
            JUDGES.get(settings.judge),
            settings,
            job.stage.seed,
            scoring,
            self._begins,
            lambda more: job.progress.count(self._unit, more),
        )
        self._when = self._unit = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._job.start is not None and self.before is None:
            self.before = self._measured_before(state.global_step)
            if self.before and not state.global_step:
                self._job.trackers.report(self._trainer, {"before": self.before.metrics})

    def _measured_before(self, step: int) -> Evaluation | None:
        job = self._job
        self._when = "before"
        itself = job.starts_as_reference
        kept = read_json(job.paths.evaluation_before)
        if kept is None and step:
            return None  # what the run started from is not here any more
        with _said(f"{job.start} cannot be trained", "look at its weights", RequestError):
            evaluation = Evaluation(**kept) if kept else self._evaluate(with_reference=not itself)
        if kept is None and rank() == 0:
            write_json(job.paths.evaluation_before, asdict(evaluation))
        if "reference" in job.method.roles and itself and self.held_out.questions:
            evaluation.add("kl", [0.0] * len(self.held_out.questions.prompts))
        return evaluation

    def after(self) -> Evaluation:
        self._when = "after"
        with self._spoilt_by_training():
            return self._evaluate(with_reference="reference" in self._job.method.roles)

    def _begins(self, part: str, total: int, unit: str) -> None:
        """Says what is measured now, and of how much."""
        self._unit = unit
        self._job.progress.phase(f"measuring {self._when}: {part}", total, unit)

    def facts(self) -> dict[str, Any]:
        """What is saved beside a model's weights, by file name: of a reward model, how its scores are distributed."""
        job, trainer = self._job, self._trainer
        if job.method.trained != "reward_model":
            return {}
        pairs, source = self.held_out.pairs, "held-out pairs"
        if pairs is None:
            some = job.rows.dataset.select(range(min(len(job.rows.dataset), _STATISTICS_ROWS)))
            pairs, source = build_pairs(some, job.tokenizer, self._lengths), "training pairs"
        assert pairs is not None  # the trainer had rows
        with self._spoilt_by_training():
            statistics = reward_statistics(trainer.model, pairs, job.stage.eval.batch_size)
        return {REWARD_STATISTICS: asdict(statistics) | {"source": source}}

    def _evaluate(self, with_reference: bool) -> Evaluation:
        job, trainer, evaluator = self._job, self._trainer, self._evaluator
        with random_state_kept():
            if job.method.trained == "policy":
                reference = _reference(job, trainer) if with_reference else None
                evaluation = evaluator.measure(trainer.trained_model, reference)
            else:
                evaluation = evaluator.measure_reward_model(trainer.model)
            if trainer.eval_dataset and (self.held_out.pairs is None or trainer.held_out_sets):
                self._begins("held-out loss", len(trainer.get_eval_dataloader()), "batches")
                losses = trainer.held_out_losses()
                evaluation.add_whole({name: loss.value for name, loss in losses.items()}, self._rows_of_losses())
                evaluation.adds = {name: loss.adds for name, loss in losses.items()}
                evaluation.batches = [trainer.args.eval_batch_size, trainer.args.world_size]
        for name, value in evaluation.metrics.items():
            check_finite([value], f"values of `{name}`")
        return evaluation

    def _rows_of_losses(self) -> dict[str, int]:
        sets = self._trainer.held_out_sets
        return {"loss": len(self._trainer.eval_dataset)} | {f"{name}_loss": len(rows) for name, rows in sets.items()}

    def _spoilt_by_training(self) -> AbstractContextManager[None]:
        newest = newest_checkpoint(self._job.paths.checkpoints)
        return _said(
            "training has spoilt the model, and it is not saved",
            f"give another `run_dir` and a lower `{self._job.stage.name}.learning_rate`"
            + (f"; {newest.path} is the newest checkpoint" if newest else ""),
        )


def measured(job: Job, trainer: StageTrainer) -> Measuring:
    """What measures the model of a trainer, before anything else happens as training begins, and when it is asked."""
    measuring = Measuring(job, trainer)
    trainer.begin_with(measuring)
    return measuring


@contextmanager
def _said(what: str, hint: str, kind: type[AlignctlError] = AlignctlError) -> Iterator[None]:
    """Says of a measurement that is no number what follows from it, as an error of a `kind`."""
    try:
        yield
    except NotANumber as error:
        raise kind(f"{what}: {error.problems[0].message}", hint) from error


def _lengths(job: Job, trainer: StageTrainer) -> Lengths:
    """As the trainer cuts its rows."""
    return Lengths(
        seen=longest_seen(trainer.trained_model),
        max_length=getattr(trainer.args, "max_length", None),
        longest_prompt=trainer.args.max_prompt_length if trainer.scoring else None,
        truncation_mode=getattr(trainer.args, "truncation_mode", "keep_start"),
        drops_longer=job.method.trained == "reward_model",
    )


def _reference(job: Job, trainer: StageTrainer) -> Reference:
    """The reference the policy was trained against: a model beside it, the adapter off, or its weights loaded again."""
    policy, weights = trainer.trained_model, job.weights
    if trainer.ref_model is not None:
        return lambda: nullcontext(trainer.accelerator.unwrap_model(trainer.ref_model))
    if isinstance(policy, PeftModel) and weights["reference"] == weights["policy"] and not changes_base(job.stage.peft):
        return lambda: adapter_off(policy)
    return lambda: loaded_beside(policy, partial(_load_reference, job, trainer))


def _load_reference(job: Job, trainer: StageTrainer) -> PreTrainedModel:
    model = load(job, "reference", job.weights["reference"])
    gather_as_run(model, trainer.accelerator)
    return model


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves every source of randomness as it was, so that measuring changes nothing about training."""
    python, arrays, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(torch_cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
