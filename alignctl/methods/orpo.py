"""Odds ratio preference optimization (Hong et al. 2024, Eq. 6 and 7): imitation and preference in one stage."""

from __future__ import annotations

from alignctl.methods.preferences import BETA, LOSS_FIELDS, OWNED_FIELDS, REFERENCE_FIELDS
from alignctl.methods.registry import Method

METHOD = Method(
    name="orpo",
    summary="odds ratio preference optimization: imitate chosen and prefer it over rejected, in one stage",
    when="with pairs and a base model: it needs no SFT stage and no reference",
    paper="https://arxiv.org/abs/2403.07691",
    data_kind="preferences",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy",),
    spares_reference=None,
    stability="young",
    config_class="alignctl.trainers.preference.orpo:ORPOConfig",
    trainer="alignctl.trainers.preference.orpo:ORPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS | LOSS_FIELDS | REFERENCE_FIELDS,
    key_metrics=("rewards/accuracies", "log_odds"),
    renamed={},
    bounds=BETA,
    check=None,
    notices=None,
)
