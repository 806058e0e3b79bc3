"""Whether the disk has room for what a run writes, from the shapes of its models: before anything is loaded.
Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignctl.config.adapters import has_adapter
from alignctl.config.schema import ZERO_STAGES
from alignctl.config.stages import StageConfig
from alignctl.methods.registry import methods
from alignctl.plan.memory import Part, models_of, optimizer_of
from alignctl.plan.plan import RunPlan
from alignctl.plan.shapes import saved_in, shape_of
from alignctl.run.room import Writes, most_checkpoints, refuse_full_disk, state_bytes
from alignctl.run.state import is_done

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAVES_EVERY = 500  # steps, transformers' default (5.23)
_NUMBERS = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")


def refuse_without_room(plan: RunPlan) -> None:
    """Refuses a run whose stages would fill the disk, as far as it is known what they write.

    Raises:
        LaunchError: The disk has less free than what is left of the run is going to write, at the least.
    """
    before = 0
    for stage in plan.stages:
        folder = plan.paths.stage(stage.config.name)
        if is_done(folder) or folder.root.is_symlink():
            continue
        if writes := writes_of(stage.config):
            refuse_full_disk(stage.config, folder.root, writes, before)
            before += writes.finished


def writes_of(stage: StageConfig) -> Writes | None:
    """What a stage writes at the least; None where its model is not known here. How many checkpoints there are depends
    on its rows, which nobody has counted: those of `max_steps`, else one."""
    shape = shape_of(stage.model)
    method = methods()[stage.method]
    if not shape or method.product == "rows" or not all(isinstance(shape.get(key), int) for key in _NUMBERS):
        return None
    try:
        models = models_of(stage, shape)
    except (KeyError, TypeError):  # a config.json without a number that its family has
        return None
    if models is None:
        return None
    own = models[method.trained]
    learns = [part for role in models for part in models[role] if part.learns]
    checkpoint, trained = sum(map(_size, learns)), sum(map(_count, learns))
    if not stage.trainer.get("save_only_model"):
        by_deepspeed = stage.distributed.type in ZERO_STAGES
        checkpoint += state_bytes(optimizer_of(stage), by_deepspeed, trained, checkpoint)
    adapter = sum(_size(part) for part in own if part.learns) if has_adapter(stage.peft) else 0
    whole = 0 if stage.leaves_adapter else _count(own[0]) * _saved_size(stage, shape)
    return Writes(checkpoint, _checkpoints(stage.trainer), adapter + whole)


def _count(part: Part) -> int:
    return sum(one.numbers * one.count for one in part.tensors)


def _size(part: Part) -> int:
    return _count(part) * part.size


def _saved_size(stage: StageConfig, shape: Mapping[str, Any]) -> int:
    """Bytes of a number of the finished model."""
    kind, held = stage.model.save_dtype, stage.model.dtype
    if held == "auto":  # that of the checkpoint where an adapter is trained
        held = saved_in(shape) if has_adapter(stage.peft) and stage.model.path else "float32"
    if kind == "auto":
        kind = held if stage.taken_by or stage.model.path is None else saved_in(shape)
    return _BYTES.get(kind, 2)


def _checkpoints(trainer: Mapping[str, Any]) -> int:
    """Most checkpoints at a time, as far as steps are known without rows; one is saved where a stop is requested."""
    steps, every = trainer.get("max_steps") or -1, trainer.get("save_steps", _SAVES_EVERY)
    if trainer.get("save_strategy", "steps") != "steps" or steps <= 0:
        return 1
    saves = math.ceil(steps / (every if every >= 1 else max(every * steps, 1)))
    return max(1, most_checkpoints(saves, trainer.get("save_total_limit"), bool(trainer.get("load_best_model_at_end"))))
