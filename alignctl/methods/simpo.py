"""Simple preference optimization (Meng et al. 2024, Eq. 6): mean log-probability as the reward, with a margin."""

from __future__ import annotations

from alignctl.methods.preferences import LOSS_FIELDS, OWNED_FIELDS, REFERENCE_FIELDS
from alignctl.methods.registry import Method

_OWN_LOSS_FIELDS = {key: reason for key, reason in LOSS_FIELDS.items() if key != "label_smoothing"}

METHOD = Method(
    name="simpo",
    summary="simple preference optimization: mean log-probability as the reward, a margin, no reference",
    when="pairs and little memory; keep the learning rate low, nothing holds the policy back",
    paper="https://arxiv.org/abs/2405.14734",
    data_kind="preferences",
    roles=("policy",),
    stability="young",
    config_class="alignctl.trainers.simpo:SimPOConfig",
    trainer="alignctl.trainers.simpo:SimPOTrainer",
    owned_fields=OWNED_FIELDS | _OWN_LOSS_FIELDS | REFERENCE_FIELDS,
    key_metrics=("rewards/accuracies", "rewards/margins"),
    check=None,
)
