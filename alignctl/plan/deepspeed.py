"""DeepSpeed's settings from ours. Pure and torch-free.

The trainer owns batch size, accumulation, clipping, precision, optimizer and schedule: DeepSpeed is told `auto`, or
nothing, and takes them from it. Names: https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.config.schema import ZERO_STAGES, DistributedSettings


def deepspeed_config(distributed: DistributedSettings, on_cpu: bool) -> dict[str, Any] | None:
    """The content of DeepSpeed's JSON file; None where `distributed.type` is not one of its stages.

    Args:
        on_cpu: Whether the processes have no GPUs. DeepSpeed's CPU optimizer, which it compiles, is left out then.
    """
    stage = ZERO_STAGES.get(distributed.type)
    if stage is None:
        return None
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # else it saves no weights that transformers reads
    if distributed.type == "zero3_offload":
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # whichever the stage's `optim` names
        "steps_per_print": 1_000_000_000,  # metrics.jsonl says it
    }
    if on_cpu:
        config["zero_force_ds_cpu_optimizer"] = False
    return _over(config, distributed.config)


def _over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those given laid over them, mapping by mapping."""
    merged = dict(settings)
    for key, value in given.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
