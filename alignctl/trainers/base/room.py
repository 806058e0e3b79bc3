"""How many bytes a stage writes beside its small files, asked of its trainer: checkpoints, and the finished model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from alignctl.models.merging import is_beside
from alignctl.run import room
from alignctl.run.room import Writes
from alignctl.trainers.base.averages import is_schedule_free
from alignctl.trainers.base.moving_reference import moves

_FILES, _BLOCK = 10, 4096  # of a converted checkpoint: files for each weight, and bytes that one is rounded up to


def writes_of(
    trainer: Trainer, checkpoints: int, model: nn.Module, dtype: torch.dtype | None = None, merge: bool = True
) -> Writes:
    """What training and saving `model` writes.

    Args:
        checkpoints: Most that are there at a time.
        model: The trained one without what a trainer has around it, an adapter included.
        dtype: Of the finished model; None for that of the weights.
        merge: Whether an adapter is merged, or kept alone.
    """
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    checkpoint = _bytes(trained)
    if not trainer.args.save_only_model:
        checkpoint += state_bytes(trainer, trained)
        if moves(trainer.args):
            checkpoint += _bytes(trainer.ref_model.parameters())
    return Writes(
        checkpoint,
        checkpoints,
        finished=_finished(model, dtype, merge),
        conversion=_conversion(trained),
    )


def _finished(model: nn.Module, dtype: torch.dtype | None, merge: bool) -> int:
    adapter = 0
    if isinstance(model, PeftModel):
        adapter = _bytes(weight for weight in model.parameters() if weight.requires_grad)
        if not merge:
            return adapter
    weights = [weight for name, weight in model.named_parameters() if not is_beside(name)]
    return adapter + sum(_count(weight) * (dtype or _saved_type(weight)).itemsize for weight in weights)


def _saved_type(weight: nn.Parameter) -> torch.dtype:
    """What is saved for a weight; those in 4 bits come from a checkpoint that is of 16, but for a few."""
    return torch.bfloat16 if _in_4_bits(weight) else weight.dtype


def _in_4_bits(weight: nn.Parameter) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _bytes(weights: Iterable[nn.Parameter]) -> int:
    return sum(_count(weight) * weight.element_size() for weight in weights)


def _count(weight: nn.Parameter) -> int:
    """Numbers in a weight, all processes' parts where ZeRO-3 shares it out, and those of 4 bits one by one."""
    return weight.quant_state.shape.numel() if _in_4_bits(weight) else getattr(weight, "ds_numel", weight.numel())


def state_bytes(trainer: Trainer, trained: list[nn.Parameter]) -> int:
    """What the trainer's optimizer keeps."""
    kept = "schedule_free" if is_schedule_free(trainer.args) else str(trainer.args.optim.value)
    return room.state_bytes(kept, trainer.is_deepspeed_enabled, sum(map(_count, trained)), _bytes(trained))


def _conversion(trained: list[nn.Parameter]) -> int:
    return (2 * room.DEEPSPEED_STATE + 4) * sum(map(_count, trained)) + _FILES * _BLOCK * len(trained)


def checkpoints_at_a_time(args: TrainingArguments, rows: int, keep_last: int | None) -> int:
    """Most checkpoints that are there while so many rows are trained on: a new one is complete before an old one goes.

    Args:
        keep_last: `save_total_limit`, which a trainer's own settings no longer have.
    """
    every = steps_between_saves(args, rows)
    if every is None:
        return 1  # the one that a request to stop saves
    saves = math.ceil(optimizer_steps(args, rows) / every)
    return room.most_checkpoints(saves, keep_last, args.load_best_model_at_end)


def steps_between_saves(args: TrainingArguments, rows: int) -> int | None:
    """Optimizer steps between two checkpoints; None where none are saved."""
    if args.save_strategy == SaveStrategy.NO:
        return None
    if args.save_strategy != SaveStrategy.STEPS:
        return _steps_per_epoch(args, rows)
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * optimizer_steps(args, rows)
    return math.ceil(every)


def optimizer_steps(args: TrainingArguments, rows: int, together: int | None = None) -> int:
    """Optimizer steps of a whole training on so many rows, each of them a row for each completion drawn to it.

    Args:
        together: Rows of the batches that all processes have at once, where that is not left to the trainer's settings.
    """
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(_steps_per_epoch(args, rows, together) * args.num_train_epochs)


def _steps_per_epoch(args: TrainingArguments, rows: int, together: int | None = None) -> int:
    whole = math.floor if args.dataloader_drop_last else math.ceil
    together = together or args.train_batch_size * args.world_size
    batches = whole(rows * getattr(args, "num_generations", 1) / together)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
