"""Group relative policy optimization (Shao et al. 2024), with the variants that TRL has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.groups import BOUNDS, OWNED_FIELDS, RENAMED, check_groups, notices_of_groups, spares_reference
from alignctl.methods.registry import EVERY_OTHER_COLUMN, NOT_NEGATIVE, POSITIVE, Bound, Method

_CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
# Losses whose papers have more than what the sum is divided by: the setting, its default, the paper's value, the paper.
_BESIDE = {
    "dr_grpo": ("scale_rewards", "group", "none", "arXiv:2503.20783"),
    "luspo": ("importance_sampling_level", "token", "sequence", "arXiv:2602.05261"),
}


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    yield from check_groups(name, stage, num_generations=8)
    loss, epsilon = stage.get("loss_type", "dapo"), stage.get("epsilon", 0.2)
    if loss == "cispo" and stage.get("epsilon_high") is None:
        yield Problem(
            f"`{name}.loss_type=cispo` takes `{name}.epsilon_high` for the largest ratio, and without it all would be "
            f"cut to `{name}.epsilon={epsilon}`",
            f"ScaleRL's is `{name}.epsilon_high=5.0`",
        )
    if loss == "vespo" and stage.get("importance_sampling_level", "token") != "token":
        yield Problem(
            f"`{name}.loss_type=vespo` weights whole completions by itself",
            f"set `{name}.importance_sampling_level=token`",
        )
    by_vllm = stage.get("generation") == "vllm" or stage.get("use_vllm")
    mode = stage.get("vllm_importance_sampling_mode", "sequence_mask")
    corrected = stage.get("vllm_importance_sampling_correction", True)
    if loss == "vespo" and by_vllm and corrected and not str(mode).startswith("token"):
        yield Problem(
            f"`{name}.loss_type=vespo` weights tokens for what vLLM computes otherwise, and "
            f"`{name}.vllm_importance_sampling_mode={mode}` completions",
            f"set `{name}.vllm_importance_sampling_mode=token_truncate`",
        )
    yield from _check_adapted(name, stage)
    yield from _check_unused(name, stage, loss)
    delta, high = stage.get("delta"), stage.get("epsilon_high") or epsilon
    if all(isinstance(one, int | float) for one in (delta, high)) and delta <= 1 + high:
        yield Problem(
            f"`{name}.delta={delta}` bounds the ratio before the clipping does, at {1 + high:g}",
            f"set it above, INTELLECT-2's is `{name}.delta=4`",
        )
    if stage.get("multi_objective_aggregation") == "normalize_then_sum":
        for key, neutral in (
            ("scale_rewards", ("group", True, None)),
            ("normalize_rewards", ("none", None)),
            ("reward_clip", (None,)),
            ("missing_eos_penalty", (None,)),
            ("soft_overlong_tokens", (None,)),
        ):
            if stage.get(key) not in neutral:
                yield Problem(
                    f"`{name}.{key}` would have no effect with `multi_objective_aggregation=normalize_then_sum`, which "
                    "scales each source of rewards by itself",
                    f"take `{name}.{key}` out",
                )
    if stage.get("zero_signal_groups") == "redraw" and by_vllm:
        yield Problem(
            f"`{name}.zero_signal_groups=redraw` cannot be where vLLM draws: each process needs another number of "
            "completions",
            f"set `{name}.zero_signal_groups=drop`, or `{name}.generation=transformers`",
        )
    if stage.get("max_redraws") is not None and stage.get("zero_signal_groups") != "redraw":
        yield Problem(
            f"`{name}.max_redraws` would have no effect", f"set `{name}.zero_signal_groups=redraw`, or take it out"
        )


def _check_adapted(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the entropy's weight starts within what it is adapted to."""
    usual = {"entropy_coef_min": 0.0, "entropy_coef": 0.0, "entropy_coef_max": 1.0}
    least, start, most = (stage.get(key, value) for key, value in usual.items())
    numbers = all(isinstance(one, int | float) for one in (least, start, most))
    if stage.get("use_adaptive_entropy") and numbers and not least <= start <= most:
        yield Problem(
            f"`{name}.entropy_coef={start}` does not lie between `entropy_coef_min={least}` and "
            f"`entropy_coef_max={most}`, to which it is adapted",
            f"set `{name}.entropy_coef` or these",
        )


def _check_unused(name: str, stage: Mapping[str, Any], loss: str) -> Iterator[Problem]:
    """Settings of other losses, and of what is switched off."""
    adaptive = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
    for keys, wanted, hint in (
        (("delta",), loss in _CLIPPED, "it is for losses that clip: " + ", ".join(_CLIPPED)),
        (("epsilon",), loss in _CLIPPED, "it is for losses that clip: " + ", ".join(_CLIPPED)),
        (("epsilon_high",), loss in (*_CLIPPED, "cispo"), "it is for losses that clip, and cispo"),
        (("sapo_temperature_pos", "sapo_temperature_neg"), loss == "sapo", f"set `{name}.loss_type=sapo`"),
        (("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), loss == "vespo",
         f"set `{name}.loss_type=vespo`"),
        (adaptive, bool(stage.get("use_adaptive_entropy")), f"set `{name}.use_adaptive_entropy=true`"),
        (("use_bias_correction_kl",), not spares_reference({"beta": 0} | dict(stage)), f"set `{name}.beta`"),
    ):  # fmt: skip
        for key in (key for key in keys if stage.get(key) is not None and not wanted):
            yield Problem(f"`{name}.{key}` would have no effect", hint)


def _notices(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    yield from notices_of_groups(name, stage, num_generations=8)
    loss = stage.get("loss_type", "dapo")
    if loss not in _BESIDE or stage.get("multi_objective_aggregation") == "normalize_then_sum":
        return
    key, usual, value, paper = _BESIDE[loss]
    given = {True: "group", False: "none"}.get(stage.get(key, usual), stage.get(key, usual))
    if given != value:
        yield (
            f"`{name}.loss_type={loss}` is half of what its paper has ({paper}) with `{name}.{key}={given}`: the other "
            f"half is `{name}.{key}={value}`"
        )


METHOD = Method(
    name="grpo",
    summary="group relative policy optimization: several completions a prompt, each learnt by what it is better",
    when="with a program that scores, as for maths, code or formats; no value model is held",
    paper="https://arxiv.org/abs/2402.03300",
    data_kind="prompts",
    row_columns=(EVERY_OTHER_COLUMN,),
    product="model",
    makes=None,
    roles=("policy", "reference", "reward_model"),
    spares_reference=lambda stage: spares_reference({"beta": 0} | dict(stage)),
    stability="young",
    config_class="alignctl.trainers.on_policy.group.config:GRPOConfig",
    trainer="alignctl.trainers.on_policy.group.grpo:GRPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS,
    key_metrics=("reward", "completions/mean_length"),
    renamed=RENAMED,
    bounds=BOUNDS
    | {
        **dict.fromkeys(
            ("sapo_temperature_pos", "sapo_temperature_neg", "entropy_coef_delta", "max_redraws",
             "vllm_importance_sampling_clip_max"),
            POSITIVE,
        ),
        **dict.fromkeys(
            ("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "entropy_coef", "entropy_coef_min",
             "entropy_coef_max", "entropy_target", "off_policy_mask_threshold", "vllm_importance_sampling_clip_min"),
            NOT_NEGATIVE,
        ),
        "top_entropy_quantile": Bound(above=0, most=1),
        "delta": Bound(above=1),
    },
    check=_check,
    notices=_notices,
)  # fmt: skip
