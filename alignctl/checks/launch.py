"""Checks of the sections `distributed` and `launcher`. Torch-free."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.slurm import check_slurm, check_stage_launchers
from alignctl.checks.values import check_value, distributed_type
from alignctl.config.schema import QUANTIZED, ZERO_STAGES
from alignctl.config.stages import merged_section, stage_launcher
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.errors import Problem

_ZERO = "deepspeed.runtime.zero.config:DeepSpeedZeroConfig"
_OFFLOAD = "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffload{}Config"
# What belongs to the stage, and where it is set.
_OWNED = {
    "train_batch_size": "it follows from `per_device_train_batch_size`, accumulation and processes",
    "train_micro_batch_size_per_gpu": "set the stage's `per_device_train_batch_size`",
    "gradient_accumulation_steps": "set the stage's `gradient_accumulation_steps`",
    "gradient_clipping": "set the stage's `max_grad_norm`",
    "bf16": "set the stage's `bf16`",
    "fp16": "set the stage's `fp16`",
    "optimizer": "set the stage's `optim` and `learning_rate`",
    "scheduler": "set the stage's `lr_scheduler_type`",
}
# Settings beside those of `zero_optimization` that do something here.
_TOP = (
    "activation_checkpointing", "aio", "checkpoint", "comms_logger", "communication_data_type", "data_types",
    "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients",
    "sparse_gradients", "steps_per_print", "torch_autocast", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


def check_launch(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """Whether the processes that are asked for fit how they are to work together."""
    distributed, launcher = (_mapping(config.get(key)) for key in ("distributed", "launcher"))
    kind = distributed_type(config)
    yield from check_stage_launchers(launcher, stages)
    if kind in ZERO_STAGES and importlib.util.find_spec("deepspeed") is None:
        yield Problem(f"`distributed={kind}` needs the package `deepspeed`", 'pip install "alignctl[deepspeed]"')
    yield from _deepspeed(kind, distributed.get("config") or {})
    own = _mapping(launcher.get("stages"))
    for name in stages:
        where = f"launcher.stages.{name}" if name in own else "launcher"
        yield from _processes(config, kind, stage_launcher(config, name), where)
        yield from check_slurm(stage_launcher(config, name), where)
        yield from _whole_weights(kind, name, _mapping(config[name]))
        peft = merged_section(config, name, "peft").get("type")
        if peft in QUANTIZED and ZERO_STAGES.get(kind) == 3:
            yield Problem(
                f"`distributed={kind}` divides weights, and those of `peft.type={peft}` in `{name}` are packed in "
                "4 bits",
                "set `distributed=zero2`, or `peft=lora`",
            )


def _processes(config: Mapping[str, Any], kind: Any, launcher: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Whether the processes of one stage fit together and find each other."""
    gpus, processes = launcher.get("gpus_per_node"), launcher.get("processes")
    nodes = launcher.get("nodes", 1)
    if any(not isinstance(value, (int, type(None))) for value in (gpus, processes, nodes)):
        return  # reported with its key
    if gpus and processes:
        yield Problem(
            f"`{where}.gpus_per_node` and `{where}.processes` exclude each other: the second is for CPUs",
            f"set `{where}.{'gpus_per_node' if launcher.get('type') == 'slurm' else 'processes'}=null`",
        )
    if kind == "none" and (nodes or 1) * (gpus or processes or 1) > 1:
        yield Problem(
            f"`{where}` asks for {(nodes or 1) * (gpus or processes or 1)} processes, and `distributed` is none",
            "set `distributed=ddp`, or `distributed=zero3` for a model that does not fit one GPU",
        )
    if kind != "none" and not (gpus or processes):
        yield Problem(
            f"`distributed={kind}` needs to know how many processes there are",
            "set `launcher.gpus_per_node=8`, for example, or `launcher.processes=2` on a machine without GPUs",
        )
    if isinstance(rank := launcher.get("node_rank", 0), int) and rank >= (nodes or 1):
        yield Problem(f"`launcher.node_rank={rank}`, but there are {nodes} machines, counted from 0")
    if (nodes or 1) > 1 and launcher.get("type", "local") == "local":
        yield from _machines(config, launcher, where)


def _machines(config: Mapping[str, Any], launcher: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Whether several machines on which the same command is started find each other."""
    if not launcher.get("rdzv_endpoint"):
        yield Problem(
            f"`{where}.nodes` is more than 1: the machines have to find each other",
            "set `launcher.rdzv_endpoint=HOST:29500` of the first, and start the same command on each with its own "
            "`launcher.node_rank`, or let SLURM do it with `launcher=slurm`",
        )
    if not config.get("run_dir"):
        yield Problem(
            f"`{where}.nodes` is more than 1: they need one run directory that all of them see", "set `run_dir`"
        )


def _whole_weights(kind: str, name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether a stage keeps more than one copy of weights that its processes divide."""
    optimizer = stage.get("optim")
    if isinstance(optimizer, str) and optimizer.startswith("schedule_free") and kind in (*ZERO_STAGES, "fsdp2"):
        yield Problem(
            f"`{name}.optim={optimizer}` averages weights, which it needs whole, and `distributed={kind}` divides what "
            "optimizers keep",
            "set `distributed=ddp`, or another `optim`",
        )
    if stage.get("sync_ref_model") and kind == "fsdp2":
        yield Problem(
            f"`{name}.sync_ref_model` changes a reference that `distributed=fsdp2` divides, and no checkpoint would "
            "hold it",
            "set `distributed=zero3`",
        )


def _deepspeed(kind: str, given: Any) -> Iterator[Problem]:
    """Whether DeepSpeed knows the settings given for it, and they are not the stage's."""
    where = "distributed.config"
    if not isinstance(given, Mapping) or not given:
        return  # another type is reported with its key
    if kind not in ZERO_STAGES:
        yield Problem(
            f"`{where}` would have no effect: `distributed={kind}` is not DeepSpeed's", "set `distributed=zero2`"
        )
        return
    for key, value in given.items():
        if key in _OWNED:
            yield Problem(f"`{where}.{key}` is not DeepSpeed's to set", _OWNED[key])
        elif key not in _TOP:
            yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, _TOP, prefix=f"{where}."))
        elif key == "zero_optimization":
            yield from _zero(f"{where}.{key}", value)


def _zero(where: str, given: Any) -> Iterator[Problem]:
    if not isinstance(given, Mapping):
        yield Problem(f"`{where}` must be a mapping, got `{given}`")
        return
    if importlib.util.find_spec("deepspeed") is None:
        return  # reported
    for key, value in given.items():
        part = key.removeprefix("offload_").capitalize() if key.startswith("offload_") else None
        if key == "stage":
            yield Problem(f"`{where}.stage` is not to be set", "choose it with `distributed=zero1`, `zero2` or `zero3`")
        elif part in ("Param", "Optimizer") and isinstance(value, Mapping):
            yield from _fields(f"{where}.{key}", value, _OFFLOAD.format(part))
        else:
            yield from _fields(where, {key: value}, _ZERO)


def _fields(where: str, given: Mapping[str, Any], config_class: str) -> Iterator[Problem]:
    """Keys and types by DeepSpeed's own config class; those of stage 3 are written with `stage3_` before them."""
    known = config_fields(config_class)
    names = [*known, *(f"stage3_{name}" for name in known)]
    for key, value in given.items():
        field = known.get(key) or known.get(key.removeprefix("stage3_"))
        if field is None:
            yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, names, prefix=f"{where}."))
        elif field.annotation in ("int", "bool", "float", "str") and value != "auto":
            yield from check_value(f"{where}.{key}", value, field.annotation)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
