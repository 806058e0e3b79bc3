"""REINFORCE leave-one-out (Ahmadian et al. 2024): no value model, and the KL penalty in the reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.groups import BOUNDS, OWNED_FIELDS, RENAMED, check_groups, notices_of_groups, spares_reference
from alignctl.methods.registry import EVERY_OTHER_COLUMN, Method


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    yield from check_groups(name, stage, num_generations=2)
    ends = stage.get("reward_clip_range")
    if isinstance(ends, list) and (len(ends) != 2 or ends[0] >= ends[1]):
        yield Problem(
            f"`{name}.reward_clip_range` is the least and the largest reward, got `{ends}`",
            f"for example `{name}.reward_clip_range=[-1,1]`",
        )


def _notices(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    yield from notices_of_groups(name, stage, num_generations=2)


METHOD = Method(
    name="rloo",
    summary="REINFORCE leave-one-out: several completions a prompt, each learnt by what it is better than the others",
    when="as PPO, with a reward model or a program that scores, but without a value model",
    paper="https://arxiv.org/abs/2402.14740",
    data_kind="prompts",
    row_columns=(EVERY_OTHER_COLUMN,),
    product="model",
    makes=None,
    roles=("policy", "reference", "reward_model"),
    spares_reference=spares_reference,
    stability="young",
    config_class="alignctl.trainers.on_policy.group.config:RLOOConfig",
    trainer="alignctl.trainers.on_policy.group.rloo:RLOOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS,
    key_metrics=("reward", "kl"),
    renamed=RENAMED,
    bounds=BOUNDS,
    check=_check,
    notices=_notices,
)
