"""Simple preference optimization (Meng et al. 2024, Eq. 6): mean log-probability as the reward, with a margin."""

from __future__ import annotations

from alignctl.methods.preferences import BETA, LOSS_FIELDS, OWNED_FIELDS, REFERENCE_FIELDS, SMOOTHING
from alignctl.methods.registry import NOT_NEGATIVE, Method

_OWN_LOSS_FIELDS = {key: reason for key, reason in LOSS_FIELDS.items() if key != "label_smoothing"}


METHOD = Method(
    name="simpo",
    summary="simple preference optimization: mean log-probability as the reward, a margin, no reference",
    when="with pairs and little memory; keep the learning rate low, for nothing holds the policy back",
    paper="https://arxiv.org/abs/2405.14734",
    data_kind="preferences",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy",),
    spares_reference=None,
    stability="young",
    config_class="alignctl.trainers.preference.simpo:SimPOConfig",
    trainer="alignctl.trainers.preference.simpo:SimPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS | _OWN_LOSS_FIELDS | REFERENCE_FIELDS,
    key_metrics=("rewards/accuracies", "rewards/margins"),
    renamed={},
    bounds=BETA | SMOOTHING | {"gamma_beta_ratio": NOT_NEGATIVE},
    check=None,
    notices=None,
)
