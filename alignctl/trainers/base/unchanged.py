"""Notices a training after which every weight is what it was before: a learning rate too small for the weights' type,
or nothing to learn from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.models.bits import sum_of_bits


class Unchanged(TrainerCallback):
    """Compares the trained weights when training begins, which may be in the middle, with those when it ends."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._before = (0, torch.zeros(0))
        self.since: int | None = None
        """The step since which no weight has changed in any process; None where one has, or no step was taken."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._before = (state.global_step, checksums(self._trainer.model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        (step, before), accelerator = self._before, self._trainer.accelerator
        changed = (checksums(self._trainer.model) != before).any().float().to(accelerator.device)
        still = state.global_step > step and not accelerator.reduce(changed, "sum").item()
        self.since = step if still else None


def checksums(model: nn.Module) -> Tensor:
    """Sums of the bits of the trained weights, `[weights]`; of those that ZeRO-3 or FSDP2 divide, of this process's
    part."""
    parts = [getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad]
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    return torch.stack([sum_of_bits(part) for part in parts])
