"""Ends a run whose processes do not train one model: where a wrapper is missing each would train its own, silently."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.models.bits import sum_of_bits


class OneModel(TrainerCallback):
    """Looks at the model's wrapper before the first optimizer step, and after it at what every process holds.

    A RuntimeError it raises is a bug, whoever's: no setting would mend it.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._looked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._looked = False
        check_wrapped(self._trainer.model_wrapped, self._trainer.accelerator)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._looked:
            check_same(self._trainer.model, self._trainer.accelerator)
        self._looked = True


def check_wrapped(model: nn.Module, accelerator: Accelerator) -> None:
    """Whether a model is as accelerate prepares it for several processes.

    Raises:
        RuntimeError: It is not, and so its gradients would not be shared.
    """
    if accelerator.num_processes == 1:
        return
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from deepspeed import DeepSpeedEngine as wrapper
    else:
        wrapper = FSDPModule if kind == DistributedType.FSDP else DistributedDataParallel
    if not isinstance(model, wrapper):
        raise RuntimeError(
            f"{accelerator.num_processes} processes would each train a model of their own: {type(model).__name__} is "
            f"no {wrapper.__name__}"
        )


def check_same(model: nn.Module, accelerator: Accelerator) -> None:
    """Whether the trained weights that every process holds whole are the same in all of them, bit for bit.

    Raises:
        RuntimeError: They are not.
    """
    if accelerator.num_processes == 1:
        return
    sums = accelerator.gather(checksum(model).to(accelerator.device)[None])
    if (sums != sums[0]).any():
        raise RuntimeError(
            f"the weights differ between processes after an optimizer step: their checksums are {sums.tolist()}"
        )


def checksum(model: nn.Module) -> Tensor:
    """Sum of the bits of all trained weights, those left out that ZeRO-3 or FSDP2 divide among processes."""
    total = torch.zeros((), dtype=torch.int64)
    for weight in model.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor) and not hasattr(weight, "ds_id"):
            total += sum_of_bits(weight)
    return total
