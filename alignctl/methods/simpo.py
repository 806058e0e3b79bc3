"""Simple preference optimization (Meng et al. 2024, Eq. 6): mean log-probability as the reward, with a margin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.errors import Problem
from alignctl.methods.preferences import LOSS_FIELDS, OWNED_FIELDS, REFERENCE_FIELDS, check_smoothing
from alignctl.methods.registry import Method

_OWN_LOSS_FIELDS = {key: reason for key, reason in LOSS_FIELDS.items() if key != "label_smoothing"}


def _check(name: str, stage: Mapping[str, Any]) -> Iterator[Problem]:
    ratio = stage.get("gamma_beta_ratio", 0.5)
    if isinstance(ratio, (int, float)) and ratio < 0:
        yield Problem(f"`{name}.gamma_beta_ratio` must be at least 0, got `{ratio}`")
    yield from check_smoothing(name, stage.get("label_smoothing", 0.0))


METHOD = Method(
    name="simpo",
    summary="simple preference optimization: mean log-probability as the reward, a margin, no reference",
    when="with pairs and little memory; keep the learning rate low, for nothing holds the policy back",
    paper="https://arxiv.org/abs/2405.14734",
    data_kind="preferences",
    takes_margin=False,
    roles=("policy",),
    stability="young",
    config_class="alignctl.trainers.simpo:SimPOConfig",
    trainer="alignctl.trainers.simpo:SimPOTrainer",
    owned_fields=OWNED_FIELDS | _OWN_LOSS_FIELDS | REFERENCE_FIELDS,
    key_metrics=("rewards/accuracies", "rewards/margins"),
    check=_check,
)
