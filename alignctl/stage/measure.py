"""What a stage measures before and after training, with the models of its trainer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alignctl.engine.forward import takes_packed_rows
from alignctl.evaluate.held_out import Cut, HeldOut, build_feedback, build_pairs, build_questions, cutter
from alignctl.evaluate.judges import JUDGES
from alignctl.evaluate.measure import Evaluation, measure
from alignctl.evaluate.reward_model import REWARD_STATISTICS, measure_reward_model, reward_statistics
from alignctl.models.adapters import Adapters
from alignctl.models.attention import put_packed_attention_on
from alignctl.models.loading import load_model
from alignctl.models.sharding import whole_weights
from alignctl.run.files import read_json, write_json
from alignctl.stage.job import Job, rank
from alignctl.stage.training import held_out_loss
from alignctl.trainers.base.managed import StageTrainer

_STATISTICS_ROWS = 256


class Measuring:
    """Measures the model of a trainer on held-out rows: completions as the trainer sees them, prompts as a policy is
    asked."""

    def __init__(self, job: Job, trainer: StageTrainer):
        self._job, self._trainer = job, trainer
        self.held_out = self._build_held_out()

    def before(self) -> Evaluation | None:
        """Before training; kept on disk, so that a run that is continued need not repeat it. None of random weights,
        which are not worth measuring."""
        job = self._job
        if job.start is None:
            return None
        job.progress.phase("measuring before")
        itself = job.starts_as_reference
        kept = read_json(job.paths.evaluation_before)
        evaluation = Evaluation(**kept) if kept else self._evaluate(with_reference=not itself)
        if kept is None and rank() == 0:
            write_json(job.paths.evaluation_before, asdict(evaluation))
        if "reference" in job.method.roles and itself and self.held_out.questions:
            evaluation.metrics["kl"] = 0.0
        return evaluation

    def after(self) -> Evaluation:
        self._job.progress.phase("measuring after")
        return self._evaluate(with_reference="reference" in self._job.method.roles)

    def facts(self) -> dict[str, Any]:
        """What is saved beside a model's weights, by file name: of a reward model, how its scores are distributed."""
        job, trainer = self._job, self._trainer
        if job.method.trained != "reward_model":
            return {}
        pairs, source = self.held_out.pairs, "held-out pairs"
        if pairs is None:
            some = job.rows.dataset.select(range(min(len(job.rows.dataset), _STATISTICS_ROWS)))
            pairs, source = build_pairs(some, job.tokenizer, self._cutter()), "training pairs"
        assert pairs is not None  # the trainer had rows
        statistics = reward_statistics(trainer.model, pairs, job.stage.eval.batch_size)
        return {REWARD_STATISTICS: asdict(statistics) | {"source": source}}

    def _build_held_out(self) -> HeldOut:
        job = self._job
        if job.held_rows is None:
            return HeldOut()
        cut, settings = self._cutter(), job.stage.eval
        kind, dataset = job.held_rows.format.kind, job.held_rows.dataset
        limit = self._longest_seen()
        room = limit - settings.max_new_tokens if limit else None
        asks = job.method.trained == "policy" and settings.prompts and "prompt" in dataset.column_names
        return HeldOut(
            pairs=build_pairs(dataset, job.tokenizer, cut) if kind == "preferences" else None,
            feedback=build_feedback(dataset, job.tokenizer, cut) if kind == "feedback" else None,
            questions=build_questions(dataset["prompt"], job.tokenizer, settings.prompts, room) if asks else None,
        )

    def _cutter(self) -> Cut:
        """TRL's trainers of policies cut what is too long, that of reward models leaves it out."""
        args = self._trainer.args
        longest = getattr(args, "max_length", None)
        return cutter(
            self._longest_seen() if longest is None else longest,
            getattr(args, "truncation_mode", "keep_start"),
            drops_longer=self._job.method.trained == "reward_model",
        )

    def _longest_seen(self) -> int | None:
        return getattr(self._trainer.trained_model.config.get_text_config(), "max_position_embeddings", None)

    def _evaluate(self, with_reference: bool) -> Evaluation:
        job, trainer = self._job, self._trainer
        with random_state_kept(), whole_weights(trainer.model_wrapped, trainer.ref_model):
            if job.method.trained == "policy":
                evaluation = measure(
                    trainer.trained_model,
                    self._reference if with_reference else None,
                    job.tokenizer,
                    self.held_out,
                    JUDGES.get(job.stage.eval.judge),
                    job.stage.eval,
                    job.stage.seed,
                )
            elif self.held_out.pairs is None:
                evaluation = Evaluation()
            else:
                evaluation = Evaluation(
                    measure_reward_model(trainer.model, self.held_out.pairs, job.stage.eval.batch_size)
                )
            if trainer.eval_dataset and self.held_out.pairs is None:
                evaluation.metrics["loss"] = held_out_loss(trainer)
        return evaluation

    def _reference(self) -> AbstractContextManager[PreTrainedModel]:
        return _reference(self._job, self._trainer)


@contextmanager
def _reference(job: Job, trainer: StageTrainer) -> Iterator[PreTrainedModel]:
    """The reference the policy was trained against: a model beside it, the adapter off, or its weights loaded again."""
    policy, stage, weights = trainer.trained_model, job.stage, job.weights
    if trainer.ref_model is not None:
        yield trainer.accelerator.unwrap_model(trainer.ref_model)
    elif isinstance(policy, PeftModel) and weights["reference"] == weights["policy"]:
        with Adapters(policy).under(None):
            yield policy
    else:
        model = load_model(stage.model, "reference", weights["reference"], job.tokenizer, stage.peft, stage.seed)
        if takes_packed_rows(policy):
            put_packed_attention_on(model, policy.device)
        yield model.to(policy.device).eval()


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
