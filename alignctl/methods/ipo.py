"""Identity preference optimization (Azar et al. 2023, Eq. 17): a squared loss with a finite target."""

from __future__ import annotations

from alignctl.methods.preferences import BETA, LOSS_FIELDS, OWNED_FIELDS, REFERENCE, check_reference
from alignctl.methods.registry import Method

METHOD = Method(
    name="ipo",
    summary="identity preference optimization: move the log-ratios apart by a fixed amount",
    when="with pairs free of noise, which DPO would push apart without end",
    paper="https://arxiv.org/abs/2310.12036",
    data_kind="preferences",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy", "reference"),
    spares_reference=None,
    stability="young",
    config_class="alignctl.trainers.preference.ipo:IPOConfig",
    trainer="alignctl.trainers.preference.ipo:IPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS | LOSS_FIELDS,
    key_metrics=("rewards/accuracies", "rewards/margins"),
    renamed={},
    bounds=BETA | REFERENCE,
    check=check_reference,
    notices=None,
)
