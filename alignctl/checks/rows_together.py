"""Checks of `distributed.parallelism_config`: processes that compute rows together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.values import distributed_type, method_of
from alignctl.config.checkpoints import describe_model
from alignctl.config.stages import first_stage, merged_section, stage_launcher
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.errors import Problem
from alignctl.methods.registry import methods

_WHERE = "distributed.parallelism_config"
_SIZE = f"{_WHERE}.sp_size"
# accelerate's other names, and why they are not taken.
_OTHERS = {
    "cp_size": "its ring looks at rows one by one, and these are packed with what they share: set `sp_size`",
    "tp_size": "weights are divided by `distributed=fsdp2` or `distributed=zero3`",
    "dp_replicate_size": "it follows from the number of processes",
    "dp_shard_size": "it follows from the number of processes and `distributed`",
    "sp_backend": "rows are divided by alignctl's own engine",
}
# Fields with which rows are padded, and their values that do not.
_PADS = {"engine": ("auto", "shared_prefix"), "label_smoothing_factor": (0,), "neftune_noise_alpha": (None, 0)}


def check_rows_together(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """Whether the processes of each stage can compute rows together, where that is asked for."""
    distributed = config.get("distributed")
    given = distributed.get("parallelism_config") if isinstance(distributed, Mapping) else None
    if not isinstance(given, Mapping):
        return  # another type is reported with its key
    for key in given:
        if key in _OTHERS:
            yield Problem(f"`{_WHERE}.{key}` is not to be set", _OTHERS[key])
        elif key != "sp_size":
            yield Problem(f"unknown key `{_WHERE}.{key}`", did_you_mean(key, ["sp_size"], prefix=f"{_WHERE}."))
    size = given.get("sp_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        yield Problem(f"`{_SIZE}` must be a whole number of at least 1, got `{size}`", f"set `{_SIZE}=2`")
    elif size > 1:
        if distributed_type(config) == "none":
            yield Problem(f"`{_SIZE}={size}` needs several processes, and `distributed` is none", "`distributed=ddp`")
        for name in stages:
            yield from _stage(config, name, size)


def _stage(config: Mapping[str, Any], name: str, size: int) -> Iterator[Problem]:
    stage, method = config[name], method_of(config, name)
    launcher = stage_launcher(config, name)
    each = launcher.get("gpus_per_node") or launcher.get("processes")
    if isinstance(each, int) and each % size:
        yield Problem(
            f"`{_SIZE}={size}` does not divide the {each} processes of a machine of `{name}`",
            f"set one that divides {each}, or other `launcher.gpus_per_node`",
        )
    if not method.divides_rows:
        takers = ", ".join(f"`{other.name}`" for other in methods().values() if other.divides_rows)
        yield Problem(
            f"`{_SIZE}={size}` cannot be with the method `{method.name}` of `{name}`: it is there for {takers}",
            "leave it out",
        )
        return
    fields = {key: field.default for key, field in config_fields(method.config_class).items()} | dict(stage)
    if method.mixes_rows and (reason := method.mixes_rows(fields)):
        yield Problem(f"`{_SIZE}={size}` and the settings of `{name}` exclude each other: {reason}", "leave it out")
    for key, packed in _PADS.items():
        if fields[key] not in packed:
            yield Problem(
                f"`{_SIZE}={size}` and `{name}.{key}={fields[key]}` exclude each other: padded rows are not divided",
                f"leave one of them out: `{name}.{key}={'null' if packed[0] is None else packed[0]}`",
            )
    described = describe_model(merged_section(config, first_stage(config, name), "model")) or {}
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = described.get(key)
        if isinstance(heads, int) and heads % size:
            yield Problem(
                f"`{_SIZE}={size}` does not divide the heads of the model of `{name}`: {heads} (`{key}`)",
                f"set one that divides {heads}",
            )
            return
