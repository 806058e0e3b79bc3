"""Weights that ZeRO-3 or FSDP2 divides among processes: made whole where somebody has to look at them.

The only place that touches DeepSpeed itself; transformers and accelerate do the rest. What FSDP2 divides is made in
dividing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations import deepspeed as integration

from alignctl.engine.forward import has_all_weights


def start_deepspeed_on_cpu() -> None:
    """Starts DeepSpeed's communication for processes without GPUs; to be called before the trainer's settings are made.

    accelerate starts only torch's there, and DeepSpeed then takes itself for a single process. The operation that is
    switched off would be compiled, and gives the same numbers as gloo.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


@contextmanager
def whole_weights(*models: nn.Module | None) -> Iterator[None]:
    """Models with all their weights in every process, where ZeRO-3 divides them; under FSDP2 with those that no layer
    gathers when it is run. All processes enter together.

    Args:
        models: As they are trained: with DeepSpeed's engine around them once there is one, because that would divide a
            layer's weights again after each time it is run.
    """
    there = [model for model in models if model is not None]
    if any(isinstance(model, FSDPModule) for model in there):
        with gathered_outside_layers(*there):
            yield
        return
    divided = [p for model in there for p in model.parameters() if hasattr(p, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    engines = [model for model in models if isinstance(model, deepspeed.DeepSpeedEngine)]
    with deepspeed.zero.GatheredParameters(divided):
        for engine in engines:
            remove_hooks(engine)
        try:
            yield
        finally:
            for engine in engines:
                add_hooks(engine)


@contextmanager
def gathered_outside_layers(*models: nn.Module) -> Iterator[None]:
    """Under FSDP2 layers gather their weights whenever they are run; what lies outside of them, when the whole model is
    run from its outermost module, which measuring does not do. Nothing is done to other models."""
    roots = [model for model in models if isinstance(model, FSDPModule)]
    for root in roots:
        root.unshard()
    try:
        yield
    finally:
        for root in roots:
            root.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a model on the CPU of the first process, by name (elsewhere an empty mapping), one gathered after
    another; None where they are not divided. All processes call it together."""
    shared = any(hasattr(p, "ds_id") for p in model.parameters())
    if has_all_weights(model) and not shared and not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # of weights that have two names there must be one
    for name, tensor in model.state_dict(keep_vars=True).items():
        with _gathered(tensor) as whole:
            if first:
                if id(tensor) not in copies:
                    copies[id(tensor)] = whole.detach().cpu().clone().contiguous()
                state[name] = copies[id(tensor)]
    return state


@contextmanager
def _gathered(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, all of it where ZeRO-3 or FSDP2 divides it; all processes enter together."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor


def load_trained(trainer: Trainer, checkpoint: str) -> None:
    """Puts the weights of a checkpoint into a trainer's model, without anything that is needed to train on."""
    with to_write(trainer.accelerator.unwrap_model(trainer.model)) as writes:
        if writes:
            trainer._load_from_checkpoint(checkpoint)


@contextmanager
def saved_without_weights(model: nn.Module) -> Iterator[None]:
    """DeepSpeed's engine saves what its optimizer keeps, and not the weights, which are in a file of their own; under
    ZeRO-3 each process has but its share of them, and saves that."""
    if getattr(model, "zero_optimization_stage", int)() not in (1, 2):
        yield
        return
    model.module_state_dict = lambda *args, **options: {}
    model.save_checkpoint = partial(model.save_checkpoint, exclude_frozen_parameters=True)
    try:
        yield
    finally:
        del model.module_state_dict, model.save_checkpoint


@contextmanager
def loaded_without_weights() -> Iterator[None]:
    """DeepSpeed's engines load a checkpoint that was saved without weights, and leave those they have."""
    from deepspeed import DeepSpeedEngine

    usual = DeepSpeedEngine.load_module_state_dict

    def load(engine: Any, checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
        if checkpoint["module"]:
            usual(engine, checkpoint, *args, **options)

    DeepSpeedEngine.load_module_state_dict = load
    try:
        yield
    finally:
        DeepSpeedEngine.load_module_state_dict = usual


@contextmanager
def to_write(model: nn.Module) -> Iterator[bool]:
    """All weights of a model to be written to; all processes enter together. Yields whether this one writes: where
    ZeRO-3 divides them, the first does for all."""
    divided = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not divided:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0):
        yield torch.distributed.get_rank() == 0


@contextmanager
def undivided() -> Iterator[None]:
    """Models that are made or loaded here are whole in every process, also under ZeRO-3."""
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config
