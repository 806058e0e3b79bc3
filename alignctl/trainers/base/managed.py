"""The base of every trainer: what a stage may ask of one, and what it does whatever it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from alignctl.data.lengths import RowLengths
from alignctl.engine.forward import is_divided
from alignctl.errors import RequestError, refused
from alignctl.models.saving import Configs
from alignctl.models.sharding import divided_by_zero, release_after_backward
from alignctl.rollout.scoring import Scoring
from alignctl.run.checkpoints import Checkpoint
from alignctl.run.paths import StagePaths
from alignctl.trainers.base.agreement import EndsStepsTogether, StopRequest
from alignctl.trainers.base.averages import KeepsAverages
from alignctl.trainers.base.checkpointing import CompleteCheckpoints
from alignctl.trainers.base.columns import CarriesRowColumns
from alignctl.trainers.base.early_stopping import StopsEarly
from alignctl.trainers.base.fitting import Fitting
from alignctl.trainers.base.halving import Halving
from alignctl.trainers.base.held_out import HeldOutLoss, MeasuredLoss
from alignctl.trainers.base.moving_reference import KeepsReference
from alignctl.trainers.base.not_finite import StopsWhenNotFinite
from alignctl.trainers.base.replicas import ChecksReplicas, OneModel
from alignctl.trainers.base.tokens import CountsTokens
from alignctl.trainers.base.unchanged import Unchanged
from alignctl.trainers.base.unused import LooksForUnused
from alignctl.trainers.base.warm_up import WarmsUp


class StageTrainer(Protocol):
    """What a stage may ask of a trainer. `Managed` before a class of transformers or TRL is one."""

    model: nn.Module
    """As it was made, or with FSDP2's parts in it."""
    model_wrapped: nn.Module
    """The same as it is trained: in DDP, DeepSpeed's engine, or itself."""
    ref_model: nn.Module | None
    """The reference where it is a model of its own."""
    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator
    train_dataset: Dataset
    """Rows as they are trained on."""
    eval_dataset: Dataset | None
    held_out_sets: Mapping[str, Sequence[int]]
    """Names of sets of the held-out rows, where they are several, and which rows each has."""
    processing_class: PreTrainedTokenizerBase
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    notices: list[str]
    """What people should know of how it was built."""
    lengths_of: dict[str, RowLengths]
    """Of the rows that it was given, by what they are for: `train`, and `eval` where it makes token ids of these."""
    start: Configs
    """What the model's configs were before anything was made of it."""
    keep_last: int | None
    """`save_total_limit`, which transformers is not told."""
    scoring: Scoring | None
    """What scores completions, where it learns from its own."""
    show_samples: Callable[[list[dict[str, Any]]], None] | None
    """Is given completions that training drew, with their scores, whenever it logs."""
    unchanged: Unchanged
    """Whether training left the weights as they were."""
    stops_early: StopsEarly | None
    """What ends training early, where that is wanted."""
    fitting: Fitting | None
    """Finds in the first step, which is then a rehearsal's, how much of a GPU's memory may be used."""
    tell: Callable[[str], None]
    """Tells people something while it is training."""
    stop: StopRequest | None
    """Is told at the end of every step whether any process was asked to stop."""

    @property
    def trained_model(self) -> PreTrainedModel: ...

    @property
    def num_entries(self) -> int: ...

    @property
    def is_divided(self) -> bool: ...

    def train(self, resume_from_checkpoint: str | None = None) -> Any: ...

    def held_out_losses(self) -> dict[str, MeasuredLoss]: ...

    def checkpoint_kind(self) -> dict[str, Any]: ...

    def take_over(self, checkpoint: Checkpoint) -> bool: ...

    def is_world_process_zero(self) -> bool: ...

    def add_callback(self, callback: TrainerCallback) -> None: ...

    def begin_with(self, callback: TrainerCallback) -> None: ...


class Managed(
    EndsStepsTogether,
    StopsWhenNotFinite,
    ChecksReplicas,
    CarriesRowColumns,
    HeldOutLoss,
    WarmsUp,
    KeepsAverages,
    KeepsReference,
    CompleteCheckpoints,
    LooksForUnused,
):
    """Mixin before a class of transformers or TRL: has all processes end a step together, stops at numbers that are
    none, or early where that is wanted, hands rows' own columns to the loss, counts each held-out row once, learns from
    the first step of a warm-up, saves checkpoints whole or not at all, and makes sure that all processes train one
    model, and that it is trained."""

    ref_model: nn.Module | None = None
    start: Configs
    notices: list[str]
    scoring: Scoring | None = None
    show_samples: Callable[[list[dict[str, Any]]], None] | None = None
    fitting: Fitting | None = None

    def __init__(self, *args: Any, count_rows: Callable[[int], None] = lambda more: None, **kwargs: Any):
        """`count_rows` is told of more rows that were made ready, as that goes."""
        self.count_rows = count_rows
        self.notices = []
        self.lengths_of: dict[str, RowLengths] = {}
        self.tell = self.notices.append
        self.halving = Halving(StagePaths(Path(kwargs["args"].output_dir).parent).halved)
        model = getattr(kwargs["model"], "policy", kwargs["model"])
        self.start = copy.deepcopy(Configs(model.config, getattr(model, "generation_config", None)))
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, OneModel(self))
        self.add_callback(CountsTokens(self))
        self.unchanged = Unchanged(self)
        self.add_callback(self.unchanged)
        self.stops_early: StopsEarly | None = None
        if self.args.early_stopping_patience:
            self.stops_early = StopsEarly(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            self.add_callback(self.stops_early)

    def begin_with(self, callback: TrainerCallback) -> None:
        """Adds a callback before all others but the one that makes sure of the model's wrapper."""
        self.callback_handler.callbacks.insert(1, callback)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if divided_by_zero(self.model):
            release_after_backward(self.model)
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        batches, args, count = super().get_train_dataloader(), self.args, self.num_entries
        there = count * getattr(args, "num_generations", 1)
        if there < args.world_size:
            raise RequestError(
                f"{args.world_size} processes cannot share {there} row{'s' if there > 1 else ''}: in every step some "
                "would have nothing to do",
                f"start {there} process{'es' if there > 1 else ''} or fewer, or give more rows",
            )
        if not len(batches):
            raise RequestError(
                "`dataloader_drop_last` leaves nothing to train on: a batch is of "
                f"{args.train_batch_size * args.world_size} rows, and there are {count}",
                "set the stage's `dataloader_drop_last=false`, or a smaller `per_device_train_batch_size`",
            )
        return batches

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with refused(f"the optimizer `{self.args.optim.value}`"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with refused(f"the schedule `{self.args.lr_scheduler_type.value}`"):
            return super().create_scheduler(*args, **kwargs)

    @property
    def trained_model(self) -> PreTrainedModel:
        """Without what processes or a value model have around it."""
        model = self.accelerator.unwrap_model(self.model)
        return getattr(model, "policy", model)

    @property
    def num_entries(self) -> int:
        """What batches have so many of in an epoch: rows, or whatever stays together of them."""
        return len(self.train_dataset)

    @property
    def is_divided(self) -> bool:
        """Whether processes divide the weights of the trained model."""
        return is_divided(self.trained_model)
