"""Proximal policy optimization (Schulman et al. 2017, Eq. 7) with a value model, as in InstructGPT."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.registry import NOT_NEGATIVE, POSITIVE, RUN_OWNED_FIELDS, SHARE, Bound, Method

_BOUNDS = {
    **dict.fromkeys(
        ("temperature", "cliprange", "cliprange_value", "response_length", "max_prompt_length", "num_ppo_epochs",
         "num_mini_batches", "target_kl", "kl_horizon", "update_tokens", "rollout_tokens", "reward_clip"),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("kl_coef", "entropy_coef", "vf_coef", "value_warmup_steps", "num_sample_completions"), NOT_NEGATIVE
    ),
    "gamma": SHARE,
    "lam": SHARE,
    "dual_clip": Bound(above=1, hint="3 is its paper's"),
}  # fmt: skip
_COLOCATED = ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode")


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    functions = stage.get("reward_funcs") or []
    functions = functions if isinstance(functions, list) else [functions]
    if not stage.get("reward_model") and not functions:
        yield Problem(
            f"`{name}` needs something that scores completions",
            f"set `{name}.reward_model` to a stage, a folder or a Hub id, or `{name}.reward_funcs=[module:function]`",
        )
    for target in functions:
        if isinstance(target, str) and not all(target.rpartition(":")[::2]):
            yield Problem(f"`{name}.reward_funcs`: `{target}` is no `module:function` or `file.py:function`")
        elif (file := str(target).rpartition(":")[0]).endswith(".py") and not Path(file).is_file():
            yield Problem(f"`{name}.reward_funcs={target}`: there is no file {file}")
    weights, sources = stage.get("reward_weights"), len(functions) + bool(stage.get("reward_model"))
    if isinstance(weights, list) and len(weights) != sources:
        yield Problem(f"`{name}.reward_weights` has {len(weights)} values for {sources} sources of rewards")
    if stage.get("normalize_rewards") == "statistics" and not stage.get("reward_model"):
        yield Problem(
            f"`{name}.normalize_rewards=statistics` needs a reward model", f"set `{name}.normalize_rewards=running`"
        )
    names = [str(target).rpartition(":")[2] for target in functions]
    if len(set(names)) < len(names) or {"reward_model", "score"} & set(names):
        yield Problem(
            f"`{name}.reward_funcs`: each function is logged under its name, which must be its own and not "
            f"`reward_model` or `score`; got {', '.join(names)}"
        )
    yield from _check_generation(name, stage)


def _check_generation(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether vLLM is there where it is asked for, and asked for where it is set up."""
    wanted = stage.get("generation") == "vllm"
    if wanted and importlib.util.find_spec("vllm") is None:
        yield Problem(f"`{name}.generation=vllm` needs the package `vllm`", 'pip install "alignctl[vllm]"')
    mode = stage.get("vllm_mode", "colocate")
    for key in (key for key in stage if key.startswith("vllm_")):
        needed = "colocate" if key in _COLOCATED else "server"
        if not wanted:
            yield Problem(f"`{name}.{key}` would have no effect without vLLM", f"set `{name}.generation=vllm`")
        elif key != "vllm_mode" and needed != mode:
            yield Problem(f"`{name}.{key}` would have no effect", f"it is for `{name}.vllm_mode={needed}`")


METHOD = Method(
    name="ppo",
    summary="proximal policy optimization: draw completions, score them, move towards the better ones",
    when="with a reward model or a program that scores, and time to draw completions",
    paper="https://arxiv.org/abs/1707.06347",
    data_kind="prompts",
    takes_margin=False,
    product="model",
    makes=None,
    roles=("policy", "reference", "reward_model", "value_model"),
    stability="young",
    config_class="alignctl.trainers.ppo.config:PPOConfig",
    trainer="alignctl.trainers.ppo.trainer:PPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    owned_fields=RUN_OWNED_FIELDS
    | {
        "gradient_accumulation_steps": "set `update_tokens`: a mini-batch is divided into passes of so many tokens",
        "remove_unused_columns": "only prompts are taken from the rows",
        "train_sampling_strategy": "prompts are drawn in a random order",
        "neftune_noise_alpha": "PPO needs the policy's own log-probabilities",
        "eval_on_start": "a stage is measured before and after",
        "load_best_model_at_end": "there are no evaluations to compare",
        "eval_strategy": "a stage is measured before and after",
        "label_smoothing_factor": "there are no labels",
    },
    key_metrics=("score", "kl/k1"),
    bounds=_BOUNDS,
    check=_check,
)
