"""Checks of adapters: what they could not be trained, compared or saved with, and names that match nothing. Torch-free.

Names are looked up in the files of a checkpoint on this machine; the worker does it again in the loaded model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignctl.checks.values import distributed_type, method_of
from alignctl.config.adapters import (
    HEADS,
    REFUSED,
    REFUSED_STARTS,
    has_adapter,
    names_module,
    rewrites_base,
    without_bias,
    without_effect,
)
from alignctl.config.schema import PEFT_CLASSES, QUANTIZED, ZERO_STAGES
from alignctl.config.stages import first_stage, merged_section
from alignctl.config.trl_fields import config_fields
from alignctl.config.weights import saved_tensors
from alignctl.errors import Problem

_UNMERGED = "or keep the adapter alone with `model.merge=false`"


def check_adapter(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether the adapter of a stage can be trained, compared with its start, and saved as is wanted."""
    peft, model = (merged_section(config, name, section) for section in ("peft", "model"))
    if not has_adapter(peft) or peft["type"] not in list(PEFT_CLASSES):
        return  # another type is reported with its key
    merge = model.get("merge") is not False
    yield from _refused(peft)
    yield from _start(config, peft, merge)
    if not merge:
        yield from _kept_alone(config, name)
    yield from _scaled_to_nothing(peft)
    yield from _layers(peft)
    method = method_of(config, name)
    assert method is not None
    if method.trained == "policy":
        yield from _on_head(peft)
    if peft.get("layer_replication"):
        if merge:
            yield Problem(
                "`peft.layer_replication` cannot be merged: copies of a layer share its weights",
                f"take it out, {_UNMERGED}",
            )
        if "reference" in method.roles:
            yield Problem(
                f"`peft.layer_replication` makes another model than the reference of `{name}`, with some layers twice"
            )
    yield from _reentrant(config, name)
    yield from _by_weights(config, name, peft, merge)


def check_kept_alone(config: Mapping[str, Any], stages: Sequence[str]) -> Iterator[Problem]:
    """Whether there is an adapter where it is to be kept alone."""
    for name in stages:
        own = config[name].get("model")
        own = own if isinstance(own, Mapping) else {}
        if own.get("merge") is False and not has_adapter(merged_section(config, name, "peft")):
            yield Problem(
                f"`{name}.model.merge=false` would have no effect: `{name}` trains all weights",
                "set `peft=lora`, for example",
            )
    model = config.get("model")
    alone = isinstance(model, Mapping) and model.get("merge") is False
    if alone and stages and not any(has_adapter(merged_section(config, name, "peft")) for name in stages):
        yield Problem(
            "`model.merge=false` would have no effect: no stage trains an adapter", "set `peft=lora`, for example"
        )


def keeps_adapter_alone(config: Mapping[str, Any], name: str) -> bool:
    """Whether a stage leaves an adapter and no model."""
    model = merged_section(config, name, "model")
    return model.get("merge") is False and has_adapter(merged_section(config, name, "peft"))


def _refused(peft: Mapping[str, Any]) -> Iterator[Problem]:
    fields = config_fields(PEFT_CLASSES[peft["type"]])
    for key, reason in REFUSED.items():
        value = peft.get(key)
        if value is not None and value is not False and value != fields[key].default:
            yield Problem(f"`peft.{key}` cannot be used: {reason}", f"take `{key}` out")
    start = peft.get("init_lora_weights", True)
    if isinstance(start, (str, bool)) and start in REFUSED_STARTS:
        shown = json.dumps(start) if isinstance(start, bool) else start
        yield Problem(
            f"`peft.init_lora_weights={shown}` cannot be used: {REFUSED_STARTS[start]}",
            "set `peft.init_lora_weights=true`, or `pissa`, `olora`, `orthogonal`",
        )


def _start(config: Mapping[str, Any], peft: Mapping[str, Any], merge: bool) -> Iterator[Problem]:
    """Starts that rewrite the weights under the adapter need those weights whole, and are nothing without them."""
    setting = rewrites_base(peft)
    if setting is None:
        return
    kind = distributed_type(config)
    if peft["type"] in QUANTIZED:
        yield Problem(
            f"`peft.{setting}` rewrites the weights under the adapter, and those of `peft.type={peft['type']}` are "
            "packed in 4 bits",
            "set `peft.init_lora_weights=true`, or `peft=lora`",
        )
    if ZERO_STAGES.get(kind) == 3 or kind == "fsdp2":
        yield Problem(
            f"`peft.{setting}` rewrites the weights under the adapter, and `distributed={kind}` divides them",
            "set `peft.init_lora_weights=true`, or `distributed=zero2`",
        )
    if not merge:
        yield Problem(
            f"`peft.{setting}` and `model.merge=false` exclude each other: the weights under the adapter are no longer "
            "the checkpoint's, so the adapter alone is nothing to go on from",
            "set `peft.init_lora_weights=true`, or `model.merge=true`",
        )


def _kept_alone(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """An adapter by itself needs a base that others can load, and has no type of a whole model."""
    model = merged_section(config, name, "model")
    if config[name].get("from") is None and model.get("path") is None and model.get("scratch") is not None:
        yield Problem(
            f"`model.merge=false` keeps the adapter of `{name}` alone, and the random weights under it would be lost",
            "set `model.merge=true`",
        )
    if model.get("save_dtype", "auto") != "auto":
        yield Problem(
            f"`model.save_dtype={model['save_dtype']}` would have no effect on `{name}`: with `model.merge=false` no "
            "whole model is saved"
        )


def _scaled_to_nothing(peft: Mapping[str, Any]) -> Iterator[Problem]:
    for key, effect in {"alpha_pattern": "switches the adapter off there", "rank_pattern": "leaves no adapter"}.items():
        values = peft.get(key)
        for pattern, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, (int, float)) and value <= 0:
                yield Problem(
                    f"`peft.{key}` gives `{pattern}` the value {value}, which {effect}",
                    "give a number above 0, or leave modules out with `peft.exclude_modules`",
                )


def _layers(peft: Mapping[str, Any]) -> Iterator[Problem]:
    """Layers are chosen among modules that are listed; peft takes no choice among those of an expression."""
    indices, targets = peft.get("layers_to_transform"), peft.get("target_modules")
    key = next((key for key in ("layers_to_transform", "layers_pattern") if peft.get(key) is not None), None)
    if key and isinstance(targets, str):
        yield Problem(
            f"`peft.{key}` and `peft.target_modules={targets}` exclude each other: layers are chosen among modules in "
            "a list",
            f"list them, for example `peft.target_modules=[q_proj,v_proj]`, or take `{key}` out",
        )
    elif peft.get("layers_pattern") and indices is None:
        yield Problem(
            f"`peft.layers_pattern={peft['layers_pattern']}` would have no effect: no layers are chosen",
            "set `peft.layers_to_transform`, or take `layers_pattern` out",
        )


def _on_head(peft: Mapping[str, Any]) -> Iterator[Problem]:
    why = "TRL computes log-probabilities from its weights, past an adapter"
    if names_module(peft, "lm_head"):
        listed = isinstance(peft["target_modules"], list)
        hint = "take `lm_head` out" if listed else "set `peft.exclude_modules=[lm_head]`"
        yield Problem(f"`peft.target_modules` names `lm_head`: {why}", hint)
    elif peft.get("ensure_weight_tying") and names_module(peft, "embed_tokens"):
        yield Problem(
            f"`peft.ensure_weight_tying=true` would put the adapter of `embed_tokens` on `lm_head`, too: {why}",
            "take `ensure_weight_tying` out: the adapter is then on the embeddings alone",
        )


def _reentrant(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Reentrant checkpointing runs its own backward pass, after which DDP sees the same weights again."""
    stage = config[name]
    method = method_of(config, name)
    assert method is not None
    used = stage.get("activation_checkpointing", "auto")  # which may come to it
    options = stage.get("activation_checkpointing_kwargs")
    if distributed_type(config) == "ddp" and used and isinstance(options, Mapping) and options.get("use_reentrant"):
        where = f"{name}.activation_checkpointing_kwargs.use_reentrant"
        yield Problem(
            f"`{where}=true` and `distributed=ddp` exclude each other where an adapter is trained: DDP would count its "
            "weights twice",
            f"set `{where}=false`",
        )


def _by_weights(config: Mapping[str, Any], name: str, peft: Mapping[str, Any], merge: bool) -> Iterator[Problem]:
    """What the names of a checkpoint's weights tell, as far as they are those of the model that is made of it."""
    path = merged_section(config, first_stage(config, name), "model").get("path")
    tensors = saved_tensors(Path(path).expanduser()) if isinstance(path, str) else {}
    method = method_of(config, name)
    assert method is not None
    outermost = {tensor.partition(".")[0] for tensor in tensors} - set(HEADS)
    # Else some are called otherwise once they are loaded: they lie deeper, or the experts of a mixture are one tensor.
    if len(outermost) != 1 or any("expert" in tensor for tensor in tensors):
        return
    parameters = {tensor for tensor in tensors if not tensor.startswith(HEADS)}
    parameters.add("lm_head.weight" if method.trained == "policy" else "score.weight")
    modules = {name for tensor in parameters for name in _above(tensor)}
    yield from without_effect(peft, modules, parameters)
    if peft.get("lora_bias") and merge and (module := without_bias(peft, parameters)):
        yield Problem(
            f"`peft.lora_bias=true` cannot be merged: {module} has no bias to merge into", f"take it out, {_UNMERGED}"
        )


def _above(tensor: str) -> Iterator[str]:
    """All modules that a tensor lies in, from its own outwards."""
    while tensor := tensor.rpartition(".")[0]:
        yield tensor
