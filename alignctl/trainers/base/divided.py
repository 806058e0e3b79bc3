"""Divides a trainer's model by FSDP2 as soon as the trainer is there, and lets accelerate take it as it is.

Gradients are divided, too, in every pass of a step: to wait for the last one, as accelerate does for DDP's sake, is to
hold the whole gradient in each process.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers.trainer
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from alignctl.models.dividing import divide, processes_mesh
from alignctl.models.shared_files import load_state, save_state
from alignctl.trainers.base.mixed import mixed_dtype


def divide_model(trainer: Trainer, tp_size: int = 1) -> None:
    """Under FSDP2; all processes call it together, before there is an optimizer.

    Args:
        tp_size: How many processes side by side divide the matrices of layers.
    """
    if trainer.is_fsdp_enabled:
        mesh = processes_mesh(trainer.args.device, tp_size, trainer.args.ddp_timeout)
        divide(trainer.model, mesh, mixed_dtype(trainer.args))
        _take_as_it_is(trainer.accelerator)
        _save_in_shares()


def _take_as_it_is(accelerator: Accelerator) -> None:
    """Lets accelerate prepare a model that is divided.

    accelerate (1.15) itself looks for layers by their classes, which FSDP has changed by then, and finds the weights of
    an optimizer again by where they lie in memory, while shares without rows all lie nowhere.
    """

    def prepare(*args: Any) -> list[Any]:
        accelerator._models += [one for one in args if isinstance(one, nn.Module) and one not in accelerator._models]
        return [one if isinstance(one, nn.Module) else accelerator._prepare_one(one, first_pass=True) for one in args]

    accelerator._prepare_fsdp2 = prepare
    accelerator.no_sync = lambda model: nullcontext()


def _save_in_shares() -> None:
    """Lets transformers save and load what an optimizer keeps as shared_files.py does, and weights not at all: those
    are saved as models are (checkpointing.py)."""

    def save_optimizer(_: Any, __: Any, optimizer: Any, model: nn.Module, folder: str) -> None:
        save_state(model, optimizer.optimizer, Path(folder))

    def load_optimizer(_: Any, __: Any, optimizer: Any, model: nn.Module, folder: str, **options: Any) -> None:
        load_state(model, optimizer.optimizer, Path(folder))

    transformers.trainer.save_fsdp_model = lambda *args, **options: None
    transformers.trainer.save_fsdp_optimizer = save_optimizer
    transformers.trainer.load_fsdp_optimizer = load_optimizer
