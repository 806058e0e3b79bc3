"""What settings of an adapter mean for the rest: which are refused, which change the weights under it, and what the
names among them match. Torch-free; the matching is peft's (0.21, `tuners_utils.check_target_module_exists`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from alignctl.config.suggest import did_you_mean
from alignctl.errors import Problem

_UNPREPARED = "it needs a preparation over the weights or the rows that alignctl does not do"
_MEGATRON = "it is for layers of Megatron, which no model here has"
_QALORA = "it is for weights that GPTQ has quantized"
REFUSED = {
    "alora_invocation_tokens": "the adapter would work behind these tokens alone, which packed rows and merging cannot "
    "do",
    "arrow_config": "it chooses among adapters that are trained already",
    "corda_config": _UNPREPARED,
    "eva_config": _UNPREPARED,
    "kasa_config": "it takes a part of the weights away, so that training would not start from the checkpoint",
    "loftq_config": _UNPREPARED,
    "lora_ga_config": _UNPREPARED,
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": "it adds noise to every pass, and to the loss a term that the trainers do not compute",
    "qalora_group_size": _QALORA,
    "runtime_config": "it says how peft computes, and a recipe cannot",
    "use_qalora": _QALORA,
}
"""Fields of peft's LoraConfig that may only have their default, each with the reason."""

REFUSED_STARTS: dict[Any, str] = {
    "corda": _UNPREPARED,
    "eva": _UNPREPARED,
    "loftq": _UNPREPARED,
    "lora_ga": _UNPREPARED,
    False: "the adapter would begin with a random change, so that training would not start from the checkpoint",
}
"""Values of `init_lora_weights` that are refused, each with the reason."""

HEADS = ("lm_head", "score")
"""What models call the layer that gives logits, and the one that gives a score; a model has one of them."""


def has_adapter(peft: Mapping[str, Any]) -> bool:
    """Whether a section `peft` asks for an adapter."""
    return peft.get("type", "none") != "none"


def rewrites_base(peft: Mapping[str, Any]) -> str | None:
    """The setting, `key=value`, by which the start of the adapter is taken out of the weights under it; None where
    those stay the checkpoint's."""
    start = peft.get("init_lora_weights")
    rewrites = isinstance(start, str) and (start.startswith("pissa") or start == "olora")
    return f"init_lora_weights={start}" if rewrites else None


def looks_at_base(peft: Mapping[str, Any]) -> bool:
    """Whether an adapter begins with something that is computed from the weights under it."""
    return rewrites_base(peft) is not None or bool(peft.get("use_dora"))


def changes_base(peft: Mapping[str, Any]) -> str | None:
    """The setting, `key=value`, by which a model whose adapter is switched off is not what training started from."""
    bias = peft.get("bias") or "none"
    return rewrites_base(peft) or (f"bias={bias}" if bias != "none" else None)


def without_effect(peft: Mapping[str, Any], modules: Collection[str], parameters: Collection[str]) -> Iterator[Problem]:
    """Names in a section `peft` that match nothing in a model. One section may be for language models and for models
    that score: to leave out or to train whole a head that only the others have is no mistake.

    Args:
        modules: Dotted names of all modules of the model, and
        parameters: of all its parameters.
    """
    of_others = [head for head in HEADS if not any(matches(name, [head]) for name in modules)]
    yield from _unmatched("target_modules", peft.get("target_modules"), modules)
    yield from _unmatched("modules_to_save", peft.get("modules_to_save"), [*modules, *of_others])
    yield from _unmatched("target_parameters", peft.get("target_parameters"), parameters)
    if isinstance(tokens := peft.get("trainable_token_indices"), Mapping):
        yield from _unmatched("trainable_token_indices", list(tokens), modules)
    named = [name for name in modules if _is_named(name, peft)]
    yield from _unmatched("exclude_modules", peft.get("exclude_modules"), [*named, *of_others])
    kept = [name for name in named if not matches(name, peft.get("exclude_modules"))]
    if (indices := peft.get("layers_to_transform")) is not None and isinstance(peft.get("target_modules"), list):
        layers = {name: _layer(name, peft.get("layers_pattern")) for name in kept}
        wanted = indices if isinstance(indices, list) else [indices]
        there = sorted({layer for layer in layers.values() if layer is not None})
        for index in wanted:
            if index not in there:
                seen = f"from {there[0]} to {there[-1]}" if there else "none"
                yield Problem(
                    f"`peft.layers_to_transform` names the layer {index}, and the layers with target modules are {seen}"
                )
        kept = [name for name, layer in layers.items() if layer in wanted]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in _names(peft.get(key)):
            if not any(_found(rf"(.*\.)?({pattern})$", name) for name in kept):
                yield _nothing(key, pattern, kept)
    biases = {name.removesuffix(".bias") for name in parameters if name.endswith(".bias")}
    bias = peft.get("bias") or "none"
    if not (biases & set(kept) if bias == "lora_only" else biases or bias == "none"):
        yield Problem(f"`peft.bias={bias}` would have no effect: there are no biases to train", "take `bias` out")


def matches(name: str, given: Any) -> bool:
    """Whether settings name a module, by its dotted name: with a regular expression, or one of several ends."""
    if isinstance(given, str):
        return _found(f"(?:{given})\\Z", name)
    return any(name == end or name.endswith(f".{end}") for end in _names(given))


def names_module(peft: Mapping[str, Any], module: str) -> bool:
    """Whether a section `peft` itself names a module, by its dotted name, as a target, and does not exclude it."""
    targets = peft.get("target_modules")
    return targets != "all-linear" and matches(module, targets) and not matches(module, peft.get("exclude_modules"))


def without_bias(peft: Mapping[str, Any], parameters: Collection[str]) -> str | None:
    """What has no bias, for people: one of the target modules, or a model without any where settings do not name them.
    None where all have one, or one cannot tell."""
    have = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    lack = [name for name in have if f"{name}.bias" not in parameters]
    if isinstance(targets := peft.get("target_modules"), list):
        return next((f"`{name}`" for name in sorted(lack) if matches(name, targets)), None)
    return None if any(name.endswith(".bias") for name in parameters) else "the model"


def _is_named(module: str, peft: Mapping[str, Any]) -> bool:
    """Whether settings name a module as a target; where they leave the choice to peft it may be any."""
    targets = peft.get("target_modules")
    return targets in (None, "all-linear") or matches(module, targets)


def _unmatched(key: str, given: Any, names: Collection[str]) -> Iterator[Problem]:
    if key == "target_modules" and given == "all-linear":
        return
    for one in [given] if isinstance(given, str) else _names(given):
        if not any(matches(name, given if isinstance(given, str) else [one]) for name in names):
            yield _nothing(key, one, names)


def _nothing(key: str, name: str, names: Collection[str]) -> Problem:
    """What is wrong with a name; the ends of the real ones that look like it are the hint."""
    ends = {there.rpartition(".")[2] for there in names}
    return Problem(
        f"`peft.{key}` names `{name}`, which matches nothing in the model",
        did_you_mean(name.rpartition(".")[2], {end for end in ends if not end.isdigit()}),
    )


def _layer(module: str, patterns: Any) -> int | None:
    """The number of the layer that a module lies in."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in _names(patterns)] or [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (re.match(one, module) for one in expressions)), None)
    return int(found[1]) if found else None


def _found(expression: str, name: str) -> bool:
    try:
        return re.match(expression, name) is not None
    except re.error:
        return False  # nothing matches what is no expression


def _names(given: Any) -> list[str]:
    """The names in a list, the keys of a mapping, or one name; what is none of them is reported with its type."""
    if isinstance(given, str):
        return [given]
    return [name for name in given if isinstance(name, str)] if isinstance(given, (list, Mapping)) else []
