"""What the methods that compare the completions of a prompt with each other have in common. Torch-free, pure."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.on_policy import BOUNDS as ON_POLICY_BOUNDS
from alignctl.methods.on_policy import OWNED_FIELDS as ON_POLICY_OWNED
from alignctl.methods.on_policy import check_on_policy, uneven_mini_batches
from alignctl.methods.preferences import REFERENCE, check_reference
from alignctl.methods.registry import NOT_NEGATIVE, POSITIVE, Bound

_DISTRIBUTION = "completions are drawn from the policy's own distribution, which its log-probabilities are of"
_TRANSFORMERS = "set `generation=transformers`, `continuous` or `vllm`"
_SAMPLES = "`num_sample_completions` of each log are kept in samples_while_training.jsonl"
OWNED_FIELDS = {
    **ON_POLICY_OWNED,
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), _DISTRIBUTION
    ),
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "use_transformers_paged", "transformers_continuous_batching_config",
         "cache_implementation"),
        _TRANSFORMERS,
    ),
    **dict.fromkeys(
        ("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
         "log_completions_hub_repo"),
        _SAMPLES,
    ),
    "generation_batch_size": "set `per_device_train_batch_size`: it counts the completions of a rollout",
    "num_generations_eval": "a stage is measured with one answer to each prompt",
    "shuffle_dataset": "prompts are drawn in a random order",
    "pad_to_multiple_of": "nothing is padded",
    "cast_lm_head_to_fp32": "log-probabilities are float32, whatever the head is",
    "ds3_gather_for_generation": "processes that divide a policy draw together",
    "chat_template_kwargs": "put a chat template into the model's folder, as `chat_template.jinja`",
    "max_tool_calling_iterations": "there are no tools",
    "vllm_model_impl": "vLLM's own model is used",
    "vllm_structured_outputs_regex": _DISTRIBUTION,
    "vllm_max_model_length": "it is `max_prompt_length` and `response_length` together",
    "vllm_importance_sampling_cap": "set `vllm_importance_sampling_clip_max`",
    "router_aux_loss_coef": "the loss of a mixture of experts is not added",
}  # fmt: skip
"""Fields that no stage may set, those of `trl.GRPOConfig` and `trl.RLOOConfig` without an effect here among them."""

RENAMED = {"max_completion_length": "response_length", "steps_per_generation": "num_mini_batches"}
"""TRL's names of fields of all on-policy methods."""

BOUNDS = {
    **ON_POLICY_BOUNDS,
    **REFERENCE,
    **dict.fromkeys(("num_iterations", "epsilon", "epsilon_high", "soft_overlong_tokens"), POSITIVE),
    "num_generations": Bound(least=2, hint="the completions of a prompt are each other's baseline"),
    "beta": NOT_NEGATIVE,
}


def spares_reference(stage: Mapping[str, Any]) -> bool:
    """Whether no reference is looked at while training."""
    return stage.get("beta") == 0


def check_groups(name: str, stage: Mapping[str, Any], num_generations: int) -> Iterator[Problem]:
    """What on-policy methods check, and what concerns groups, their lengths and their reference.

    Args:
        num_generations: Where the stage does not say.
    """
    yield from check_on_policy(name, {"num_generations": num_generations} | dict(stage))
    yield from check_reference(name, stage)
    if stage.get("sync_ref_model") and spares_reference(stage):
        yield Problem(
            f"`{name}.sync_ref_model` would have no effect with `{name}.beta=0`, which needs no reference",
            f"set `{name}.beta`, or `{name}.sync_ref_model=false`",
        )
    soft, longest = stage.get("soft_overlong_tokens"), stage.get("response_length", 512)
    if isinstance(soft, int) and isinstance(longest, int) and soft > longest:
        yield Problem(f"`{name}.soft_overlong_tokens={soft}` is more than `{name}.response_length={longest}`")


def notices_of_groups(name: str, stage: Mapping[str, Any], num_generations: int) -> Iterator[str]:
    """What on-policy methods say, and which bounds of ratios nothing comes up to.

    Args:
        num_generations: Where the stage does not say.
    """
    yield from uneven_mini_batches(name, {"num_generations": num_generations} | dict(stage))
    if stage.get("num_iterations", 1) * stage.get("num_mini_batches", 1) > 1:
        return
    usual = {"epsilon": 0.2, "epsilon_high": None, "delta": None}
    bounds = [key for key, value in usual.items() if stage.get(key) not in (None, value)]
    if stage.get("loss_type") == "cispo":  # which is not without one
        bounds.remove("epsilon_high")
    if stage.get("off_policy_mask_threshold") is not None and not _may_use_vllm(stage):
        bounds.append("off_policy_mask_threshold")
    if bounds:
        yield (
            f"with one optimizer step a rollout the policy is the one that drew, so nothing comes up to "
            f"{', '.join(f'`{name}.{key}`' for key in bounds)}: more steps are made by `{name}.num_iterations=2` or "
            f"`{name}.num_mini_batches=2`"
        )


def _may_use_vllm(stage: Mapping[str, Any]) -> bool:
    """Whether vLLM may draw, whose probabilities are others than the policy's."""
    asked = stage.get("use_vllm") or stage.get("generation") == "vllm"
    return bool(asked or (stage.get("generation", "auto") == "auto" and importlib.util.find_spec("vllm")))
