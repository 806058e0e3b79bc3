"""What the methods that learn from their own completions have in common. Torch-free, pure."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.registry import NOT_NEGATIVE, POSITIVE, RUN_OWNED_FIELDS

OWNED_FIELDS = RUN_OWNED_FIELDS | {
    "gradient_accumulation_steps": "set `pass_tokens`: a mini-batch is divided into passes of so many tokens",
    "remove_unused_columns": "only prompts are taken from the rows",
    "train_sampling_strategy": "prompts are drawn in a random order",
    "neftune_noise_alpha": "the policy's own log-probabilities are needed",
    "eval_on_start": "a stage is measured before and after",
    "load_best_model_at_end": "there are no evaluations to compare",
    "eval_strategy": "a stage is measured before and after",
    "early_stopping_patience": "there are no evaluations to compare",
    "early_stopping_threshold": "there are no evaluations to compare",
    "label_smoothing_factor": "there are no labels",
}
"""Fields of transformers' settings that no stage may set."""

BOUNDS = {
    **dict.fromkeys(
        ("temperature", "response_length", "max_prompt_length", "num_generations", "num_mini_batches",
         "rollout_tokens", "reward_clip", "reward_workers", "reward_timeout"),
        POSITIVE,
    ),
    **dict.fromkeys(("num_sample_completions", "reward_retries"), NOT_NEGATIVE),
}  # fmt: skip
_COLOCATED = ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode")


def check_on_policy(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether a rollout is whole, and something draws."""
    yield from _check_sizes(name, stage)
    yield from _check_generation(name, stage)


def _check_sizes(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether a rollout is made of whole groups, and of enough for its mini-batches."""
    size, group = stage.get("per_device_train_batch_size", 8), stage.get("num_generations", 1)
    parts = stage.get("num_mini_batches", 1)
    if not all(isinstance(number, int) and number > 0 for number in (size, group, parts)):
        return  # reported with its type and bounds
    if group > 1 and stage.get("auto_find_batch_size"):
        yield Problem(
            f"`{name}.auto_find_batch_size` and `{name}.num_generations={group}` exclude each other: a smaller batch "
            "would cut the completions of a prompt apart"
        )
    if size % group:
        yield Problem(
            f"`{name}.per_device_train_batch_size={size}` counts completions, and is no multiple of "
            f"`{name}.num_generations={group}`",
            f"set `{name}.per_device_train_batch_size={max(size // group, 1) * group}`",
        )
    elif size // group < parts:
        yield Problem(
            f"`{name}.num_mini_batches={parts}` is more than the prompts of a rollout, {size // group}",
            f"set `{name}.num_mini_batches={size // group}` or less",
        )


def uneven_mini_batches(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    """Whether the prompts that a process draws to are as many in one mini-batch as in the other."""
    size, group = stage.get("per_device_train_batch_size", 8), stage.get("num_generations", 1)
    parts = stage.get("num_mini_batches", 1)
    prompts = size // group
    if prompts % parts:
        even = [count for count in range(1, prompts + 1) if prompts % count == 0]
        below, above = max(count for count in even if count < parts), min(count for count in even if count > parts)
        yield (
            f"`{name}.num_mini_batches={parts}` does not divide the {prompts} prompts of a process's rollout, so some "
            f"optimizer steps have fewer of them: `{name}.num_mini_batches={below}` or `={above}` does"
        )


def _check_generation(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether vLLM is there where it is asked for, and asked for where it is set up."""
    generation, use_vllm = stage.get("generation", "auto"), stage.get("use_vllm")
    if generation != "auto" and use_vllm is not None and use_vllm != (generation == "vllm"):
        yield Problem(
            f"`{name}.use_vllm={str(use_vllm).lower()}` and `{name}.generation={generation}` exclude each other",
            f"take `{name}.use_vllm` out",
        )
        return
    if generation == "auto" and use_vllm is not None:
        generation = "vllm" if use_vllm else "transformers"
    wanted, open_to_it = generation == "vllm", generation == "auto"
    if wanted and importlib.util.find_spec("vllm") is None:
        yield Problem(f"`{name}.generation=vllm` needs the package `vllm`", 'pip install "alignctl[vllm]"')
    mode = stage.get("vllm_mode", "colocate")
    for key in (key for key in stage if key.startswith("vllm_")):
        needed = "colocate" if key in _COLOCATED else "server"
        if key.startswith("vllm_importance_sampling"):
            needed = mode
        if open_to_it and needed == "colocate":
            continue
        if not wanted:
            yield Problem(f"`{name}.{key}` would have no effect without vLLM", f"set `{name}.generation=vllm`")
        elif key != "vllm_mode" and needed != mode:
            yield Problem(f"`{name}.{key}` would have no effect", f"it is for `{name}.vllm_mode={needed}`")
