"""Proximal policy optimization (Schulman et al. 2017, Eq. 7) with a value model, as in InstructGPT."""

from __future__ import annotations

from alignctl.methods.on_policy import BOUNDS, OWNED_FIELDS, check_on_policy, uneven_mini_batches
from alignctl.methods.registry import EVERY_OTHER_COLUMN, FRACTION, NOT_NEGATIVE, POSITIVE, Bound, Method

_BOUNDS = {
    **dict.fromkeys(("cliprange", "cliprange_value", "num_ppo_epochs", "target_kl", "kl_horizon"), POSITIVE),
    **dict.fromkeys(("kl_coef", "entropy_coef", "vf_coef", "value_warmup_steps"), NOT_NEGATIVE),
    "gamma": FRACTION,
    "lam": FRACTION,
    "dual_clip": Bound(above=1, hint="3 is its paper's"),
}

METHOD = Method(
    name="ppo",
    summary="proximal policy optimization: draw completions, score them, move towards the better ones",
    when="with a reward model or a program that scores, and time to draw completions",
    paper="https://arxiv.org/abs/1707.06347",
    data_kind="prompts",
    row_columns=(EVERY_OTHER_COLUMN,),
    product="model",
    makes=None,
    roles=("policy", "reference", "reward_model", "value_model"),
    spares_reference=None,
    stability="young",
    config_class="alignctl.trainers.on_policy.ppo.config:PPOConfig",
    trainer="alignctl.trainers.on_policy.ppo.trainer:PPOTrainer",
    stage_function="alignctl.stage.run:run_stage",
    mixes_rows=None,
    divides_rows=False,
    owned_fields=OWNED_FIELDS,
    key_metrics=("score", "kl/k1"),
    renamed={"roles": "sharing", "update_tokens": "pass_tokens", "max_completion_length": "response_length"},
    bounds=BOUNDS | _BOUNDS,
    check=check_on_policy,
    notices=uneven_mini_batches,
)
