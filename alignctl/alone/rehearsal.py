"""Builds a stage as one process of many would, takes two optimizer steps, and says what was held and sent."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_model
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from alignctl.alone.counting import ROWS, SMALL, Collectives, count_gradients_of
from alignctl.alone.held import gradients, models, optimizer_state, trained_weights, weights
from alignctl.alone.made import made_completions, made_rows, stand_in
from alignctl.alone.numberless import without_numbers
from alignctl.config.schema import ZERO_STAGES
from alignctl.config.stages import StageConfig
from alignctl.methods.registry import Method, Role, methods
from alignctl.models.sharding import undivided
from alignctl.monitor.callbacks import ProgressFile, StopOnRequest
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.plan.alone import has_reward_model
from alignctl.run.files import write_json
from alignctl.run.paths import REWARD_STATISTICS, StagePaths
from alignctl.stage.build import build_arguments, build_trainer
from alignctl.stage.job import Job, rank
from alignctl.trainers.base import passes
from alignctl.trainers.base.managed import StageTrainer
from alignctl.trainers.on_policy.base import OnPolicyTrainer

STEPS = 2  # the second has the optimizer's state in memory
_LENGTH = 8  # bytes of a number
_DIFFERENT = 8  # rows that are tokenised; the others are these again


class NeverAsked(StopSignal):
    """A signal that is not given."""

    requested = False

    def __init__(self) -> None:
        self.waits = False


class Looks(TrainerCallback):
    """Looks at a trainer at the moments that matter."""

    def __init__(self, trainer: StageTrainer, method: Method, collectives: Collectives):
        self._trainer, self._method, self._collectives = trainer, method, collectives
        self._passes, self._runs = 0, Counter[Role]()
        self.seen: dict[str, Any] = {}
        for role, model in models(trainer, method).items():
            model.get_input_embeddings().register_forward_pre_hook(partial(self._run, role))
        loss_of_pass = "losses" if isinstance(trainer, OnPolicyTrainer) else "compute_loss"
        compute = getattr(trainer, loss_of_pass)

        def counted(*args: Any, **options: Any) -> Any:
            self._passes += 1
            return compute(*args, **options)

        setattr(trainer, loss_of_pass, counted)

    def on_train_begin(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        wrapped = self._trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            count_gradients_of(wrapped, self._collectives)
        if self._trainer.is_deepspeed_enabled:  # which steps within the backward pass
            step = wrapped.step

            def looked(*args: Any, **options: Any) -> Any:
                self._look_at_gradients()
                return step(*args, **options)

            wrapped.step = looked

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._collectives.forget()
        self._passes, self._runs = 0, Counter[Role]()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._look_at_gradients()  # of a pass, before the next one adds to them

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._look_at_gradients()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen |= {"collectives": self._collectives.to_dict(), "passes": self._passes, "runs": dict(self._runs)}
        self.seen["weights"] = weights(self._trainer, self._method)
        self.seen["trained"] = trained_weights(self._trainer)
        self.seen["optimizer"] = optimizer_state(self._trainer)

    def _run(self, role: Role, *_: Any) -> None:
        self._runs[role] += 1

    def _look_at_gradients(self) -> None:
        self.seen["gradients"] = max(gradients(self._trainer), self.seen.get("gradients", 0))


def rehearse(stage: StageConfig, paths: StagePaths, tokens: int, numberless: bool) -> dict[str, Any]:
    """Two steps of a stage that was prepared for it (plan/alone.py), in the place that the environment gives this
    process.

    Args:
        tokens: Of each sequence of the made rows, and at most of each completion that is made to them.
        numberless: Whether weights are without numbers.
    """
    tp_size, sp_size = stage.distributed.tp_size, stage.distributed.sp_size
    collectives = Collectives(tp_size, sp_size)
    with without_numbers() if numberless else nullcontext(), collectives:  # which sees all first
        job = _job(stage, paths, tokens)
        if max(tp_size, sp_size) > 1:
            _let_others_have_the_same_rows(collectives)
        if ZERO_STAGES.get(stage.distributed.type) == 3:
            _believe_in_agreement()
        with undivided():  # else ZeRO-3 would wait for the first process to read a reward model
            trainer = build_trainer(job, job.rows, None)
        trainer.train_dataset = _enough(trainer)
        if numberless:
            _let_losses_be_numbers(trainer)
            if isinstance(trainer, OnPolicyTrainer):
                _let_completions_be_made(trainer, tokens)
        looks = Looks(trainer, job.method, collectives)
        trainer.begin_with(looks)
        trainer.train()
    return looks.seen


def _job(stage: StageConfig, paths: StagePaths, tokens: int) -> Job:
    method, vocabulary = methods()[stage.method], stage.model.scratch["vocab_size"]
    args = build_arguments(stage, paths, {})
    tokenizer = stand_in(vocabulary)
    sources: dict[Role, str | None] = dict.fromkeys(method.roles)
    if has_reward_model(stage):
        sources["reward_model"] = _made_reward_model(stage, paths, tokenizer)
    return Job(
        stage=stage,
        weights=sources,
        paths=paths,
        progress=ProgressFile(paths, (), Heartbeat(paths, rank()), is_first=False),
        stop=StopOnRequest(NeverAsked()),
        tokenizer=tokenizer,
        rows=made_rows(method.data_kind, _DIFFERENT, tokens, vocabulary),
        held_rows=None,
        new_tokens=(),
        args=args,
    )


def _made_reward_model(stage: StageConfig, paths: StagePaths, tokenizer: PreTrainedTokenizerBase) -> str:
    """A folder with one of random weights: it comes with a tokenizer of its own, so it is read from somewhere."""
    folder = str(paths.root / "reward_model")
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    config = AutoConfig.for_model(**dict(stage.model.scratch["config"]) | own)
    with undivided():
        model = AutoModelForSequenceClassification.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_model(model, str(Path(folder, "model.safetensors")))  # transformers' own leaves it to the first process
    tokenizer.save_pretrained(folder)
    write_json(Path(folder, REWARD_STATISTICS), {"mean": 0.0, "std": 1.0, "answers": 1})
    return folder


def _enough(trainer: StageTrainer) -> Dataset:
    """The rows of a trainer, again and again, for the steps of all processes."""
    args, rows = trainer.args, trainer.train_dataset
    count = STEPS * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = math.ceil(count / getattr(args, "num_generations", 1))
    return rows.select([number % len(rows) for number in range(count)])


def _let_others_have_the_same_rows(collectives: Collectives) -> None:
    """Which those that compute rows together would show each other: how long they are, and then they themselves."""

    def shown(own: Any, group: ProcessGroup) -> list[Any]:
        collectives.add(SMALL, _LENGTH * group.size())
        collectives.add(ROWS, len(pickle.dumps(own)) * group.size())
        return [own] * group.size()

    passes.all_objects = shown


def _let_completions_be_made(trainer: OnPolicyTrainer, tokens: int) -> None:
    """They are drawn by looking at numbers."""
    length, vocabulary = min(tokens, trainer.args.response_length), len(trainer.processing_class)
    trainer.draw = lambda prompts, places: made_completions(len(prompts), length, vocabulary)


def _believe_in_agreement() -> None:
    """DeepSpeed compares the order of its layers with that of the first process, which says nothing here."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda numbers: None


def _let_losses_be_numbers(trainer: StageTrainer) -> None:
    """What a step gives back, which transformers wants on the device that it trains on."""
    training_step = trainer.training_step
    trainer.training_step = lambda *args, **options: torch.ones(training_step(*args, **options).shape)
