"""Where numbers lie: one table for the settings of a run and for what all trainers take. A method's own are in its row.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.registry import NOT_NEGATIVE, POSITIVE, Bound

_AT_LEAST_1, _AT_LEAST_10 = Bound(least=1), Bound(least=10)
_SEED = Bound(least=0, most=2**32 - 1, hint="numpy takes seeds of 32 bits")
_SHARE = Bound(least=0, most=1, hint="a share of the rows: 0.05 is 5 %")

SETTINGS = {
    "seed": _SEED,
    "log_every": _AT_LEAST_1,
    "global_batch_size": _AT_LEAST_1,
    "data.max_lost": _SHARE,
    "data.max_skipped": _SHARE,
    "data.max_truncated": _SHARE,
    "data.max_pairs": _AT_LEAST_1,
    "data.eval_rows": NOT_NEGATIVE,
    "data.limit": _AT_LEAST_1,
    "mix.limit": _AT_LEAST_1,
    "mix.weight": POSITIVE,
    "data.eval_limit": _AT_LEAST_1,
    "peft.r": _AT_LEAST_1,
    "peft.lora_alpha": Bound(above=0, hint="the adapter is scaled by it"),
    "peft.lora_dropout": Bound(least=0, below=1),
    "eval.prompts": NOT_NEGATIVE,
    "eval.max_new_tokens": _AT_LEAST_1,
    "eval.batch_size": _AT_LEAST_1,
    "eval.temperature": POSITIVE,
    "launcher.nodes": _AT_LEAST_1,
    "launcher.gpus_per_node": _AT_LEAST_1,
    "launcher.processes": _AT_LEAST_1,
    "launcher.node_rank": NOT_NEGATIVE,
    "launcher.stall_timeout": _AT_LEAST_10,
    "launcher.cpus_per_process": _AT_LEAST_1,
    "launcher.signal_seconds": _AT_LEAST_10,
    "launcher.max_requeues": NOT_NEGATIVE,
    "reward_funcs: judge.temperature": NOT_NEGATIVE,
    "reward_funcs: judge.max_tokens": _AT_LEAST_1,
    "reward_funcs: judge.parallel": _AT_LEAST_1,
    "reward_funcs: numeric.tolerance": NOT_NEGATIVE,
}
"""Of the settings of a run and its sections, and of what scores."""

TRAINER = dict.fromkeys(
    ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_train_epochs",
     "save_steps", "logging_steps", "eval_steps"),
    POSITIVE,
) | dict.fromkeys(
    ("weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers",
     "neftune_noise_alpha"),
    NOT_NEGATIVE,
) | dict.fromkeys(
    ("save_total_limit", "dataloader_prefetch_factor", "dataset_num_proc", "eval_accumulation_steps",
     "pad_to_multiple_of", "torch_empty_cache_steps", "pass_tokens", "global_batch_size", "batch_for"),
    _AT_LEAST_1,
) | dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Bound(least=0, below=1)) | {
    "data_seed": _SEED, "early_stopping_patience": _AT_LEAST_1, "early_stopping_threshold": NOT_NEGATIVE,
}  # fmt: skip
"""Of the fields that the trainers of all methods have."""


def check_setting(where: str, value: Any) -> Iterator[Problem]:
    """Whether a setting of a run lies where it may, a stage's or a machine's own too: `launcher.stages.dpo.nodes`."""
    *before, key = re.sub(r"\[\d+\]", "", where).split(".")
    section = "launcher" if before[:1] == ["launcher"] else ".".join(before[-1:])
    if bound := SETTINGS.get(f"{section}.{key}".lstrip(".")):
        yield from _check(where, value, bound)


def check_numbers(name: str, stage: Mapping[str, Any], bounds: Mapping[str, Bound]) -> Iterator[Problem]:
    """Whether the fields of a stage lie where they may."""
    for key, bound in (TRAINER | dict(bounds)).items():
        yield from _check(f"{name}.{key}", stage.get(key), bound)


def _check(where: str, value: Any, bound: Bound) -> Iterator[Problem]:
    """What is no number is reported with its type."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    too_low = (bound.least is not None and value < bound.least) or (bound.above is not None and value <= bound.above)
    too_high = (bound.most is not None and value > bound.most) or (bound.below is not None and value >= bound.below)
    if too_low or too_high:
        yield Problem(f"`{where}` must be {_described(bound)}, got `{value}`", bound.hint)


def _described(bound: Bound) -> str:
    low = f"greater than {bound.above}" if bound.least is None else f"at least {bound.least}"
    if bound.most is None and bound.below is None:
        return low
    high = f"below {bound.below}" if bound.most is None else bound.most
    return f"from {bound.least} to {high}" if bound.least is not None else f"{low} and at most {high}"
