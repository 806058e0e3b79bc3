"""What a process holds of a stage, in bytes of the tensors that are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from alignctl.methods.registry import Method, Role
from alignctl.trainers.base.managed import StageTrainer


def models(trainer: StageTrainer, method: Method) -> dict[Role, nn.Module]:
    """Of each role that has one, the trained one first."""
    trained = trainer.accelerator.unwrap_model(trainer.model)
    found: dict[Role, Any] = {method.trained: getattr(trained, "policy", trained)}
    if "reference" in method.roles:
        found["reference"] = trainer.ref_model
    if "reward_model" in method.roles[1:]:
        found["reward_model"] = getattr(trainer, "reward_model", None)
    if "value_model" in method.roles:
        found["value_model"] = getattr(trained, "value_model", None)
    return {role: model for role, model in found.items() if isinstance(model, nn.Module)}


def weights(trainer: StageTrainer, method: Method) -> dict[Role, int]:
    """Of each role that has a model; what several share counts for the first."""
    seen: set[nn.Parameter] = set()
    found = {}
    for role, model in models(trainer, method).items():
        own = [one for one in model.parameters() if one not in seen]
        seen.update(own)
        found[role] = sum(map(_held_of, own))
    return found


def trained_weights(trainer: StageTrainer) -> int:
    """Of those that learn, as a process writes them to a checkpoint: its share under FSDP2, elsewhere all."""
    return sum(
        _held_of(one) if isinstance(one, DTensor) else getattr(one, "ds_numel", one.numel()) * one.element_size()
        for one in trainer.model.parameters()
        if one.requires_grad
    )


def gradients(trainer: StageTrainer) -> int:
    """Between the backward pass and the optimizer."""
    own = _bytes((_local(one.grad) for one in trainer.model.parameters() if one.grad is not None), set())
    if (zero := _zero_optimizer(trainer)) is None:
        return own
    if (flat := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:
        return own + _bytes([flat], set())
    # Those of a tensor of which others step with a part lie in one piece with that part until then.
    parts = filter(_is_tensor, tree_leaves(zero.averaged_gradients))
    return own + sum(one.numel() * one.element_size() for one in parts)


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


def _held_of(weight: nn.Parameter) -> int:
    """What this process has of a weight: under FSDP2 its piece and what fills that up; under ZeRO-3 a part, and besides
    all of it where it is small; else all, which may lie in one piece with others."""
    if isinstance(weight, DTensor):
        return _bytes([weight.to_local()], set())
    parts = [weight, getattr(weight, "ds_tensor", None)]
    return sum(one.numel() * one.element_size() for one in parts if one is not None)


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
