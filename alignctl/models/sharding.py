"""What DeepSpeed has to be told.

The only place that touches DeepSpeed itself, with layers.py; transformers and accelerate do the rest. What FSDP2
divides is made in dividing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations import deepspeed as integration


def start_deepspeed_on_cpu() -> None:
    """Starts DeepSpeed's communication for processes without GPUs; to be called before the trainer's settings are made.

    accelerate starts only torch's there, and DeepSpeed then takes itself for a single process. The operation that is
    switched off would be compiled, and gives the same numbers as gloo.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def gather_as_run(model: nn.Module, accelerator: Accelerator) -> None:
    """Under ZeRO-3 divides a model that is not trained, if it is not yet, and lets its layers gather their weights as
    they are run."""
    from trl.models.utils import prepare_deepspeed

    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        prepare_deepspeed(model, accelerator)  # its hooks stay in the model


def divided_by_zero(model: nn.Module) -> bool:
    """Whether ZeRO-3 divides the weights of a model."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def release_after_backward(model: nn.Module) -> None:
    """Lets ZeRO-3 divide the weights of a layer again after its backward pass where a pass without gradients lies
    between that and the forward pass: a reference's that is the model without its adapter.

    DeepSpeed (0.19.8) counts in each layer what the backward pass has to come to before its weights are released. Every
    forward pass begins to count anew, one without gradients at nothing, and the backward pass then leaves all that it
    gathers until its end.
    """
    kept: list[dict[nn.Module, int]] = []

    def before(module: nn.Module, args: Any) -> None:
        counted = () if torch.is_grad_enabled() else module.modules()
        kept.append({one: one.ds_grads_remaining for one in counted if getattr(one, "ds_grads_remaining", 0) > 0})

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for one, count in kept.pop().items():
            one.ds_grads_remaining = count

    model.register_forward_pre_hook(before, prepend=True)
    model.register_forward_hook(after, always_call=True)


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
def undivided() -> Iterator[None]:
    """Models that are made or loaded here are whole in every process, also under ZeRO-3."""
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config
