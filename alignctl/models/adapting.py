"""Whether an adapter fits the model that was loaded, and can be merged into it: asked before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from alignctl.config.adapters import without_effect
from alignctl.engine.forward import has_all_weights
from alignctl.errors import Problem, RequestError


def check_names(model: PreTrainedModel, peft: Mapping[str, Any]) -> None:
    """Looks up the names in a section `peft` in a model that has no adapter yet.

    Raises:
        RequestError: Some match nothing.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    problems = [*without_effect(peft, modules, parameters), *_tokens(model, peft.get("trainable_token_indices"))]
    if problems:
        raise RequestError.from_problems(problems)


def _tokens(model: PreTrainedModel, given: Any) -> Iterator[Problem]:
    """Tokens that have no row among the embeddings."""
    rows = model.get_input_embeddings().num_embeddings
    indices = [one for part in given.values() for one in part] if isinstance(given, Mapping) else given or []
    for index in indices:
        if not 0 <= index < rows:
            yield Problem(f"`peft.trainable_token_indices` names the token {index}, and the model has {rows:,} of them")


def check_merges(model: nn.Module) -> None:
    """Merges a copy of one adapted layer of each kind. Weights in 4 bits are not what is merged into, and layers that
    processes divide cannot be tried; of those only the bias is looked at.

    Raises:
        RequestError: One cannot be merged.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in adapted.items():
        if any(getattr(layer, "lora_bias", {}).values()) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise RequestError(
                f"`peft.lora_bias=true` cannot be merged: `{name}` has no bias to merge into",
                "take it out, or keep the adapter alone with `model.merge=false`",
            )
    if getattr(model, "is_loaded_in_4bit", False):
        return
    seen = set()
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        kind = (type(layer), type(base), getattr(base, "bias", None) is None)
        divided = not has_all_weights(layer) or any(hasattr(p, "ds_id") for p in layer.parameters())
        if kind in seen or divided:
            continue
        seen.add(kind)
        try:
            copy.deepcopy(layer).merge(safe_merge=True)
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise RequestError(
                f"the adapter cannot be merged into `{name}`: {reason}",
                "change the section `peft`, or keep the adapter alone with `model.merge=false`",
            ) from error
