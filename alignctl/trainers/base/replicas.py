"""Ends a run whose processes do not train one model: where a wrapper is missing each would train its own, silently.

Looked at is the wrapper before the first step; after it, and whenever a checkpoint is going to be saved, what every
process holds whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.engine.tensor_parallel import group_of_weights
from alignctl.models.bits import sum_of_bits


class ChecksReplicas:
    """Mixin before CompleteCheckpoints and a transformers Trainer: looks before a checkpoint is written."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        when = f"in the checkpoint of step {self.state.global_step}"
        check_same(self.model, self.accelerator, when, None if self.is_deepspeed_enabled else self.optimizer)
        super()._save_checkpoint(model, trial)


class OneModel(TrainerCallback):
    """Looks before the first optimizer step and after it.

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
            check_same(self._trainer.model, self._trainer.accelerator, "after an optimizer step")
        self._looked = True


class SameGradients(TrainerCallback):
    """Where some processes divide the matrices of layers, each adds up the gradients of what else there is in a layer
    with others than those do. What they come to is the same but for the order of a sum; here it is made the same."""

    def __init__(self, model: nn.Module):
        self._model = model

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        group = group_of_weights(self._model)
        gradients = shares_of_some(p.grad for p in self._model.parameters() if p.grad is not None)
        if group is None or not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together, group=group)
        together /= group.size()
        for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


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


def check_same(model: nn.Module, accelerator: Accelerator, when: str, optimizer: Any = None) -> None:
    """Whether the weights and buffers that every process holds whole are the same in all of them, bit for bit, and what
    those hold alike that divide the matrices of layers.

    Args:
        when: Said where they are not.
        optimizer: Whose state is compared, too.

    Raises:
        RuntimeError: They are not.
    """
    if accelerator.num_processes == 1:
        return
    everyone, group = accelerator.num_processes, group_of_weights(model)
    state = [value for of_weight in optimizer.state.values() for value in of_weight.values()] if optimizer else []
    state = list(filter(torch.is_tensor, state))
    compared = [
        ("weights", checksum(model.parameters()), everyone),
        ("buffers", checksum(model.buffers()), everyone),
        ("state of the optimizer", checksum(state), everyone),
    ]
    if group:
        compared.append(("shares", checksum(shares_of_some([*model.parameters(), *state])), group.size()))
    own = torch.stack([one for _, one, _ in compared])
    sums = accelerator.gather(own.to(accelerator.device)[None])
    for (what, _, side_by_side), found in zip(compared, sums.unbind(1), strict=True):
        alike = found.view(-1, side_by_side)
        if (alike != alike[:, :1]).any():
            raise RuntimeError(f"the {what} differ between processes {when}: their checksums are {found.tolist()}")


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the bits of all tensors, those left out that ZeRO-3 or FSDP2 divide among processes."""
    whole = (one for one in tensors if not isinstance(one, DTensor) and not hasattr(one, "ds_id"))
    return sum((sum_of_bits(one) for one in whole), torch.zeros((), dtype=torch.int64))


def shares_of_some(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shares of tensors that not all processes divide: those that divide the matrices of layers have the
    same share of what else there is in a layer."""
    divided = (one for one in tensors if isinstance(one, DTensor))
    return [one.to_local() for one in divided if one.device_mesh.size() < distributed.get_world_size()]
