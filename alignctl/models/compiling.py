"""Compiles what lies between the matrix products of a model's layers with torch.compile, part by part: norms, the MLP,
and of the attention its projections, rotary embeddings and adapters, but not the kernel that attends to packed rows.

Parts of one class share one compilation, whatever their number and the length of a row. Names of weights stay as they
were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from alignctl.engine.forward import has_all_weights, last_hidden, takes_packed_rows
from alignctl.engine.head import compiled, score_tokens
from alignctl.engine.layout import pack, pad
from alignctl.models.packing import keep_out_of_graphs

_BACKEND = "inductor"
_VARIANTS = 64
"""Of one class, at most: with and without gradient, adapters, padding, and of each model's types."""


def compile_layers(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Lets the parts of a model's layers, and what its head's logits are made into, be compiled when they are first
    run. A short text is run here, so that this is known to succeed, where the model is on its device already.

    What generates with a cache runs attention as it is.

    Args:
        model: Without a wrapper; its adapters are in it already.
        device: Where it will run.
        dtype: In which it will be computed, where mixed precision makes that another one than of its weights.

    Returns:
        None, or why they cannot be; the model is then left as it was.
    """
    if getattr(model, "compiled_by", None):
        return None
    parts = list(_parts(model))
    if reason := _why_not(model, parts):
        return reason
    import torch._dynamo as dynamo  # takes a second, and memory

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _VARIANTS)
    keep_out_of_graphs()
    failures: list[str] = []

    def give_up(error: Exception) -> None:
        model.compiled_by = None
        for part in parts:
            part._compiled_call_impl = None
        what = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        failures.append(f"torch cannot compile models of type `{model.config.model_type}`: {what}")
        logging.getLogger(__name__).warning(failures[-1])

    model.compiled_by = _BACKEND
    for part in parts:
        part._compiled_call_impl = _call(part, dynamo.exc.TorchDynamoException, give_up)
    if model.device.type == device.type:
        try:
            _try_out(model, dtype or model.dtype)
        except dynamo.exc.TorchDynamoException as error:
            give_up(error)
    return failures[0] if failures else None


def _why_not(model: PreTrainedModel, parts: Sequence[nn.Module]) -> str | None:
    if not parts:
        return f"models of type `{model.config.model_type}` have no layers that are known"
    if not has_all_weights(model):
        return "processes divide the weights of a layer"
    if any(not weight.is_floating_point() for part in parts for weight in part.parameters()):
        return "the weights are quantized"
    if any(name.endswith("experts") for part in parts for name, _ in part.named_modules()):
        return "every text takes other experts of a layer"
    return None


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """What layers are made of: a layer as a whole may have a checkpoint in it."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            yield from (part for part in layer.children() if any(True for _ in part.parameters()))


def _call(part: nn.Module, failure: type[Exception], give_up: Callable[[Exception], None]) -> Callable[..., Any]:
    """How a part is called: hooks, caches, a forward of its own, as Liger's, and what compiles a whole model want it as
    it is."""
    run = compiled(type(part).forward, _BACKEND)

    def call(*args: Any, **options: Any) -> Any:
        as_it_is = options.get("past_key_values") is not None or torch.compiler.is_compiling()
        if as_it_is or part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return part._call_impl(*args, **options)
        try:
            return run(part, *args, **options)
        except failure as error:
            give_up(error)
            return part._call_impl(*args, **options)

    return call


def _try_out(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Runs a text forward, and backward to what is trained; gradients and random numbers are as they were."""
    ids, device = torch.arange(4, 24) % model.config.get_text_config().vocab_size, model.device
    layout = pack([ids], [(0,)], device) if takes_packed_rows(model) else pad([ids], 0, device)
    trained, was_training = [weight for weight in model.parameters() if weight.requires_grad], model.training
    model.train(bool(trained))
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.set_grad_enabled(bool(trained)),
            torch.autocast(device.type, dtype, enabled=dtype != model.dtype),
        ):
            out = last_hidden(model, layout)
            if model.get_output_embeddings() is not None:
                out = score_tokens(model, out[:-1], layout.input_ids.flatten()[1:], statistics=bool(trained)).logps
            if trained:
                torch.autograd.grad(out.sum(), trained, allow_unused=True)
    finally:
        model.train(was_training)
