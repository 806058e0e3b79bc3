"""Direct preference optimization (Rafailov et al. 2023, Eq. 7), and every other loss of TRL's DPOTrainer."""

from __future__ import annotations

from alignctl.methods.preferences import BETA, OWNED_FIELDS, REFERENCE, SMOOTHING, check_losses, mixed_losses
from alignctl.methods.registry import Method

METHOD = Method(
    name="dpo",
    summary="direct preference optimization: prefer chosen over rejected, near a reference",
    when="with pairs, by default; start from an SFT model that answers in the same form",
    paper="https://arxiv.org/abs/2305.18290",
    data_kind="preferences",
    row_columns=(),
    product="model",
    makes=None,
    roles=("policy", "reference"),
    spares_reference=None,
    stability="stable",
    config_class="alignctl.trainers.preference.dpo:DPOConfig",
    trainer="alignctl.trainers.preference.dpo:DPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=mixed_losses,
    divides_rows=True,
    owned_fields=OWNED_FIELDS,
    key_metrics=("rewards/accuracies", "rewards/margins"),
    renamed={},
    bounds=BETA | REFERENCE | SMOOTHING,
    check=check_losses,
    notices=None,
)
