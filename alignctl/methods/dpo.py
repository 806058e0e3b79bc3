"""Direct preference optimization (Rafailov et al. 2023, Eq. 7), with TRL's DPOTrainer."""

from __future__ import annotations

from alignctl.methods.registry import RUN_OWNED_FIELDS, Method

METHOD = Method(
    name="dpo",
    summary="direct preference optimization: prefer chosen over rejected, near a reference",
    paper="https://arxiv.org/abs/2305.18290",
    data_kind="preferences",
    roles=("policy", "reference"),
    config_class="trl.trainer.dpo_config:DPOConfig",
    trainer="trl:DPOTrainer",
    owned_fields=RUN_OWNED_FIELDS | {"padding_free": "TRL 1.16 ignores it"},
    key_metrics=("rewards/accuracies", "rewards/margins"),
)
