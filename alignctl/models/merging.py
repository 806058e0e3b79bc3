"""Puts an adapter into the weights under it, for good or for a while."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignctl.engine.forward import has_all_weights, is_divided


def is_beside(name: str) -> bool:
    """Whether a weight of an adapted model, by its name, is the adapter's, and not of what it is put into."""
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens"))


def merged(trained: PeftModel) -> PreTrainedModel:
    """The model with its adapter in its weights: sums are taken in float32, and rounded once to the weights' type."""
    _untie(trained)
    for layer in trained.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            kind = next(base.parameters()).dtype
            base.to(torch.float32)
            layer.merge()
            base.to(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return trained.merge_and_unload()


def _untie(trained: PeftModel) -> None:
    """Gives the head weights of its own where an adapter changes it, or the embeddings, and both are one weight: merged
    into that, the change of one would be in the other. peft then says so in the model's config."""
    model = trained.get_base_model()
    both = [model.get_output_embeddings(), model.get_input_embeddings()]
    if None in both or not any(isinstance(one, LoraLayer) for one in both):
        return
    head, embeddings = (one.get_base_layer() if isinstance(one, LoraLayer) else one for one in both)
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@contextmanager
def merged_meanwhile(model: nn.Module) -> Iterator[None]:
    """A model with its active adapters in its weights, and afterwards the weights with the bytes they had: peft's own
    way back subtracts, which leaves rounding behind. Weights stay where they are.

    Adapters stay as they are on weights in 4 or 8 bits, on those that have two names (what is put into the head would
    be in the embeddings), on divided ones, and on all where one of them cannot be merged or there is no room.
    """
    layers, kept = _mergeable(model), None
    try:
        try:
            kept = _Kept(layers)
            for layer in layers:
                layer.merge()
            kept.stay_in_place()
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError):
            _take_back(layers, kept)
        yield
    finally:
        _take_back(layers, kept)


@contextmanager
def bytes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the weights under adapters have the bytes they had, although others merge and take back meanwhile."""
    kept = _Kept(_mergeable(model))
    try:
        yield
    finally:
        kept.restore()


def _mergeable(model: nn.Module) -> list[BaseTunerLayer]:
    """Layers with an adapter that is on, and can be put into weights that are whole and theirs alone."""
    if is_divided(model) or not has_all_weights(model):  # what is whole now may be gathered anew before it is run
        return []
    names = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())

    def plain(weight: Tensor) -> bool:
        return weight.is_floating_point() and type(weight.data) is Tensor and names[id(weight)] == 1

    return [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        and not (layer.disable_adapters or layer.merged)
        and (weights := list(layer.get_base_layer().parameters()))
        and all(map(plain, weights))
    ]


def _take_back(layers: Sequence[BaseTunerLayer], kept: _Kept | None) -> None:
    if kept is not None:
        kept.restore()
    for layer in layers:
        layer.merged_adapters.clear()


class _Kept:
    """Copies of the weights under adapters: beside them where they take no more than half of the room that is left,
    else in the memory of the CPU."""

    def __init__(self, layers: Sequence[BaseTunerLayer]):
        weights = {weight: None for layer in layers for weight in layer.get_base_layer().parameters()}
        beside = sum(weight.nbytes for weight in weights) <= _room(next(iter(weights)).device) / 2 if weights else True
        self._weights = [(weight, weight.data, _copy(weight.data, beside)) for weight in weights]

    def stay_in_place(self) -> None:
        """Brings what took the place of a weight to where that was: others know it by its address."""
        for weight, before, _ in self._weights:
            if weight.data_ptr() != before.data_ptr():
                weight.data = before.copy_(weight.data)

    def restore(self) -> None:
        for weight, before, copy in self._weights:
            weight.data = before.copy_(copy)


def _room(device: torch.device) -> float:
    """Bytes that are free on a GPU, torch's own reserve included; of a CPU's memory there is enough."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _copy(weight: Tensor, beside: bool) -> Tensor:
    if beside:
        return weight.clone()
    return torch.empty_like(weight, device="cpu", pin_memory=True).copy_(weight)  # pinned is several times as fast
