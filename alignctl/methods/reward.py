"""Reward model (Bradley-Terry, as in Ouyang et al. 2022, Eq. 1), with TRL's RewardTrainer."""

from __future__ import annotations

from alignctl.methods.registry import RUN_OWNED_FIELDS, Method, RowColumn

METHOD = Method(
    name="reward",
    summary="reward model: a score for a completion, learnt from pairs",
    when="before PPO, to rank or filter answers, or to judge a policy",
    paper="https://arxiv.org/abs/2203.02155",
    data_kind="preferences",
    row_columns=(RowColumn(name="margin", number=True, missing=0.0),),
    product="model",
    makes=None,
    roles=("reward_model",),
    spares_reference=None,
    stability="stable",
    config_class="alignctl.trainers.reward:RewardConfig",
    trainer="alignctl.trainers.reward:RewardTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=RUN_OWNED_FIELDS
    | {"chat_template_path": "use `model.chat_template`", "eos_token": "use `model.eos_token`"},
    key_metrics=("accuracy", "margin"),
    renamed={},
    bounds={},
    check=None,
    notices=None,
)
