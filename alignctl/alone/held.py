"""What a process holds of a stage, in bytes of the tensors that are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignctl.methods.registry import Method
from alignctl.trainers.base.managed import StageTrainer


def weights(trainer: StageTrainer, method: Method) -> dict[str, int]:
    """Of each role that has a model."""
    trained = trainer.accelerator.unwrap_model(trainer.model)
    models = {role: getattr(trainer, role, None) for role in method.roles[1:]}
    if "reference" in models:
        models["reference"] = trainer.ref_model
    if "value_model" in models:
        models["value_model"] = getattr(trained, "value_model", None)
    seen: set[int] = set()
    found = {method.trained: _bytes(map(_share, getattr(trained, "policy", trained).parameters()), seen)}
    for role, model in models.items():
        if isinstance(model, nn.Module):
            found[role] = _bytes(map(_share, model.parameters()), seen)
    return found


def trained_weights(trainer: StageTrainer) -> int:
    """Of those that learn, which a checkpoint has."""
    return _bytes((_share(one) for one in trainer.model.parameters() if one.requires_grad), set())


def gradients(trainer: StageTrainer) -> int:
    """Between the backward pass and the optimizer."""
    parts = [one.grad for one in trainer.model.parameters() if one.grad is not None]
    if (zero := _zero_optimizer(trainer)) is not None:
        parts += torch.utils._pytree.tree_leaves(getattr(zero, "averaged_gradients", {}))
        parts.append(getattr(zero, "grad_partitions_flat_buffer", None))
    return _bytes(map(_local, filter(_is_tensor, parts)), set())


def optimizer_state(trainer: StageTrainer) -> int:
    """After a step; with DeepSpeed the weights in float32 that it steps with, too."""
    zero = _zero_optimizer(trainer)
    optimizer = trainer.optimizer if zero is None else zero.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
    parts = [_local(one) for state in optimizer.state.values() for one in state.values() if _is_tensor(one)]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        parts += getattr(zero, name, [])
    return _bytes(parts, set())


def _zero_optimizer(trainer: StageTrainer) -> Any:
    """DeepSpeed's, around the trainer's own; None elsewhere."""
    return trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None


def _share(weight: nn.Parameter) -> Tensor:
    """What this process has of a weight: under ZeRO-3 its part, and all of one that is small."""
    part = getattr(weight, "ds_tensor", None)
    return _local(weight) if part is None or weight.numel() else part


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of the memory that lies under tensors, each piece of it once."""
    total = 0
    for one in tensors:
        memory = one.untyped_storage()
        if memory._cdata not in seen:
            seen.add(memory._cdata)
            total += memory.nbytes()
    return total
