"""Saves the finished model where processes divide its weights, an adapter merged layer by layer. All processes call it
together; the first one writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from alignctl.models.layers import is_first, layers_of, once, without_weights, write_file, write_layers
from alignctl.models.merging import is_beside
from alignctl.models.readme import write_readme
from alignctl.models.saving import (
    Saved,
    Trained,
    bytes_of,
    is_in_4_bits,
    publishing,
    save_model,
    shown,
    start_again,
    type_of,
)
from alignctl.models.verifying import check_saved
from alignctl.run.paths import StagePaths

_BASE, _WHOLE = "base_layer", ".modules_to_save.default."


def save_divided(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    paths: StagePaths,
    load_whole: Callable[[], PreTrainedModel],
    facts: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Saved | None:
    """Saves a trained model as `save_finished` does, with no more than a layer of it whole at a time.

    It is not loaded once more: that each file has the bits that were written to it is what is made sure of. Only what
    an adapter on 4 bits is merged into is loaded whole, by the first process.

    Raises:
        AlignctlError: It has not; nothing of it is left.
    """
    model = trained.model
    if isinstance(model, PeftModel):
        _save_adapter(trained, tokenizer, paths, facts, made)
        if not trained.merge:
            return None
        if is_in_4_bits(model):
            return save_model(trained, tokenizer, paths, load_whole, facts, made) if is_first() else None
        model = model.get_base_model()
    start_again(model, trained.start)
    weights, in_memory = _weights(model), type_of(model)
    kind = trained.dtype or in_memory
    with ExitStack() as stack:
        staged = Path()
        if is_first():
            staged = stack.enter_context(publishing(paths.model, tokenizer, facts, made | {"product": "model"}))
            _write_beside(staged, model, kind)
        sums = write_layers(staged, "model", layers_of(weights), _finishing(model, kind))
        if is_first() and trained.wholly:
            check_saved(staged, model, sums)
    if not is_first():
        return None
    rounded = in_memory.itemsize < 4 or kind.itemsize < in_memory.itemsize
    return Saved(shown(kind), bytes_of(paths.model), rounded, None)


def _save_adapter(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    paths: StagePaths,
    facts: Mapping[str, Any],
    made: Mapping[str, Any],
) -> None:
    model, file = trained.model, SAFETENSORS_WEIGHTS_NAME
    with ExitStack() as stack:
        staged = Path()
        if is_first():
            staged = stack.enter_context(publishing(paths.adapter, tokenizer, facts, made | {"product": "adapter"}))
            model.save_pretrained(staged, selected_adapters=["default"], state_dict=without_weights(model))
        write_file(staged / file, get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True)))
        if is_first():
            if trained.wholly:
                check_saved(staged, model)
            write_readme(staged, model)


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is saved of a model, an adapter's beside it; weights that are tied come apart where an adapter changes one
    of them."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    adapted = any(isinstance(one, BaseTunerLayer) for one in ends)
    if model.config.tie_word_embeddings and len(ends) == 2 and (adapted or ends[0].weight is not ends[1].weight):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    weights = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    return weights if adapted else once(weights)


def _write_beside(folder: Path, model: PreTrainedModel, kind: torch.dtype) -> None:
    """All that `save_pretrained` writes but the weights."""
    model.save_pretrained(folder, state_dict=without_weights(model))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.config.dtype = shown(kind)
    model.config.save_pretrained(folder)


def _finishing(model: PreTrainedModel, kind: torch.dtype) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """What makes of a layer's weights what is saved: without an adapter, of one type, and as the checkpoints of the
    architecture have them."""
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}

    def finish(whole: dict[str, Tensor]) -> Mapping[str, Tensor]:
        found = _without_adapter(adapted, whole)
        found = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in found.items()}
        return revert_weight_conversion(model, found)

    return finish


def _without_adapter(adapted: Mapping[str, BaseTunerLayer], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a layer with its adapters in them, under the names they have without; sums are taken in
    float32."""
    found = {}
    for prefix, layer in adapted.items():
        start = f"{prefix}."
        inside = {name.removeprefix(start): whole.pop(name) for name in list(whole) if name.startswith(start)}
        if inside:
            found |= {f"{prefix}.{name}": tensor for name, tensor in _merged(layer, inside).items()}
    for name, tensor in whole.items():
        if _WHOLE in name:
            found[name.replace(_WHOLE, ".")] = tensor
        elif ".original_module." not in name and not is_beside(name):
            found[name] = tensor
    return found


def _merged(layer: BaseTunerLayer, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under an adapter with it in them, by their names in the layer that is under it.

    Args:
        whole: All of the layer's weights.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in layer.named_modules():
        for name, parameter in list(module._parameters.items()):
            tensor = whole.get(f"{path}.{name}" if path else name)
            if tensor is not None:
                kept.append((module, name, parameter))
                under = path == _BASE
                module._parameters[name] = nn.Parameter(tensor.float() if under else tensor, requires_grad=False)
    try:
        layer.merge()
        return {name: tensor.detach() for name, tensor in layer.get_base_layer().state_dict().items()}
    finally:
        layer.merged_adapters.clear()
        for module, name, parameter in kept:
            module._parameters[name] = parameter
