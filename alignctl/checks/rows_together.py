"""Checks of `distributed.parallelism_config`: processes that compute rows together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.values import distributed_type, method_of
from alignctl.config.adapters import has_adapter
from alignctl.config.checkpoints import describe_model
from alignctl.config.stages import first_stage, merged_section, stage_launcher
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.errors import Problem
from alignctl.methods.registry import methods

_WHERE = "distributed.parallelism_config"
_TOKENS, _MATRICES = "sp_size", "tp_size"
# accelerate's other names, and why they are not taken.
_OTHERS = {
    "cp_size": "its ring looks at rows one by one, and these are packed with what they share: set `sp_size`",
    "dp_replicate_size": "it follows from the number of processes",
    "dp_shard_size": "it follows from the number of processes and `distributed`",
    "sp_backend": "rows are divided by alignctl's own engine",
}
# Fields with which rows are padded, and their values that do not.
_PADS = {"engine": ("auto", "shared_prefix"), "label_smoothing_factor": (0,), "neftune_noise_alpha": (None, 0)}
# Fields that processes with parts of the same layers cannot have, and their values that do nothing.
_APART = {
    "neftune_noise_alpha": ((None, 0), "the noise would differ between processes that compute the same rows"),
    "precompute_ref_log_probs": ((False,), "each process computes them of rows of its own"),
    "fp16": ((False, None), "gradients are clipped before their scale is taken off: `bf16` has none"),
}


def check_rows_together(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """Whether the processes of each stage can compute rows together, where that is asked for."""
    distributed = config.get("distributed")
    given = distributed.get("parallelism_config") if isinstance(distributed, Mapping) else None
    if not isinstance(given, Mapping):
        return  # another type is reported with its key
    for key in given:
        if key in _OTHERS:
            yield Problem(f"`{_WHERE}.{key}` is not to be set", _OTHERS[key])
        elif key not in (_TOKENS, _MATRICES):
            yield Problem(f"unknown key `{_WHERE}.{key}`", did_you_mean(key, [_TOKENS, _MATRICES], prefix=f"{_WHERE}."))
    sizes = {key: given.get(key, 1) for key in (_TOKENS, _MATRICES)}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            yield Problem(
                f"`{_WHERE}.{key}` must be a whole number of at least 1, got `{size}`", f"set `{_WHERE}.{key}=2`"
            )
            return
    kind = distributed_type(config)
    tokens, matrices = sizes.values()
    if tokens > 1 and matrices > 1:
        yield Problem(f"`{_WHERE}.{_TOKENS}` and `{_WHERE}.{_MATRICES}` exclude each other", "leave one of them out")
    if tokens > 1:
        asked = f"`{_WHERE}.{_TOKENS}={tokens}`"
        if kind == "none":
            yield Problem(f"{asked} needs several processes, and `distributed` is none", "`distributed=ddp`")
        for name in stages:
            yield from _together(config, name, asked, tokens, _divides_tokens)
    if matrices > 1:
        asked = f"`{_WHERE}.{_MATRICES}={matrices}`"
        if kind != "fsdp2":
            yield Problem(
                f"{asked} divides what FSDP2 divides further, and `distributed` is {kind}", "set `distributed=fsdp2`"
            )
        for name in stages:
            yield from _together(config, name, asked, matrices, _divides_matrices)


def _together(config: Mapping[str, Any], name: str, asked: str, size: int, check: Any) -> Iterator[Problem]:
    """Whether so many processes of a stage can compute the same rows.

    Args:
        asked: The setting and its value, for people.
        check: Says what of the stage's fields, given all of them, does not go with it.
    """
    stage, method = config[name], method_of(config, name)
    launcher = stage_launcher(config, name)
    where = "gpus_per_node" if launcher.get("gpus_per_node") else "processes"
    each = launcher.get(where)
    if isinstance(each, int) and each % size:
        yield Problem(
            f"{asked} does not divide the {each} processes of a machine of `{name}`",
            f"set one that divides {each}, or another `launcher.{where}`",
        )
    if not method.divides_rows:
        takers = ", ".join(f"`{other.name}`" for other in methods().values() if other.divides_rows)
        yield Problem(
            f"{asked} cannot be with the method `{method.name}` of `{name}`: it is there for {takers}", "leave it out"
        )
        return
    fields = {key: field.default for key, field in config_fields(method.config_class).items()} | dict(stage)
    if method.mixes_rows and (reason := method.mixes_rows(fields)):
        yield Problem(f"{asked} and the settings of `{name}` exclude each other: {reason}", "leave it out")
    yield from check(config, name, asked, fields)
    described = describe_model(merged_section(config, first_stage(config, name), "model")) or {}
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = described.get(key)
        if isinstance(heads, int) and heads % size:
            yield Problem(
                f"{asked} does not divide the heads of the model of `{name}`: {heads} (`{key}`)",
                f"set one that divides {heads}",
            )
            return


def _divides_tokens(config: Mapping[str, Any], name: str, asked: str, fields: Mapping[str, Any]) -> Iterator[Problem]:
    for key, packed in _PADS.items():
        if fields[key] not in packed:
            yield Problem(
                f"{asked} and `{name}.{key}={fields[key]}` exclude each other: padded rows are not divided",
                f"leave one of them out: `{name}.{key}={_typed(packed[0])}`",
            )


def _divides_matrices(config: Mapping[str, Any], name: str, asked: str, fields: Mapping[str, Any]) -> Iterator[Problem]:
    peft = merged_section(config, name, "peft")
    if has_adapter(peft):
        yield Problem(
            f"{asked} and `peft.type={peft['type']}` of `{name}` exclude each other: peft puts adapters on whole "
            "matrices",
            "leave it out: the weights under an adapter are divided by `distributed=fsdp2`",
        )
    for key, (without, reason) in _APART.items():
        if fields.get(key, without[0]) not in without:
            yield Problem(
                f"{asked} and `{name}.{key}={fields[key]}` exclude each other: {reason}",
                f"leave one of them out: `{name}.{key}={_typed(without[0])}`",
            )


def _typed(value: Any) -> Any:
    """A value as a user types it."""
    return "null" if value is None else str(value).lower()
