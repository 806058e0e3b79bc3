"""PPO with a value model, arXiv:1707.06347, for language models as in arXiv:1909.08593 and InstructGPT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.models.adapters import ScoreAdapter
from alignctl.rollout.episodes import Episodes
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.on_policy.base import OnPolicyTrainer
from alignctl.trainers.on_policy.models import Outputs
from alignctl.trainers.on_policy.ppo.advantage import PPOExperience, build_experience
from alignctl.trainers.on_policy.ppo.config import PPOConfig
from alignctl.trainers.on_policy.ppo.models import ActorCritic
from alignctl.trainers.on_policy.ppo.objective import (
    adapted_kl_coef,
    policy_losses,
    value_losses,
)
from alignctl.trainers.on_policy.ppo.shared_base import share_base
from alignctl.trainers.on_policy.update import PassLoss


class PPOTrainer(Managed, OnPolicyTrainer):
    """Proximal policy optimization on prompts."""

    has_reference = True
    in_checkpoints = ("kl_coef",)

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        value_model: PreTrainedModel | None = None,
        reward_model: PreTrainedModel | None = None,
        reward_adapter: ScoreAdapter | None = None,
        reward_statistics: dict[str, float] | None = None,
        peft_config: PeftConfig | None = None,
        **others: Any,
    ):
        """`reward_adapter` is for `sharing=shared_base`, `reward_model` for the others."""
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
            if value_model is not None:  # which then is an adapter with a head, too
                value_model = get_peft_model(value_model, _with_score(peft_config))
        if args.sharing == "shared_base":
            value_model, reward_model = share_base(model, reward_adapter, processing_class.pad_token_id)
        scaled = args.normalize_rewards == "statistics" and reward_statistics and not args.reward_funcs
        scale = (reward_statistics["mean"], reward_statistics["std"]) if scaled else (0.0, 1.0)
        self.kl_coef = args.kl_coef
        super().__init__(
            model=ActorCritic(model, value_model, *scale),
            args=args,
            processing_class=processing_class,
            reward_model=reward_model,
            reward_statistics=reward_statistics,
            **others,
        )

    @property
    def rounds(self) -> int:
        return self.args.num_ppo_epochs

    @property
    def policy_learns(self) -> bool:
        return self.state.global_step >= self.args.value_warmup_steps

    @property
    def entropy_learns(self) -> bool:
        return self.args.entropy_coef > 0

    def take_step_numbers(self, everyone: Mapping[str, Tensor]) -> None:
        super().take_step_numbers(everyone)
        args, count = self.args, int(everyone["scores"].sum())
        if args.target_kl is not None:
            kl = self.rollouts.last("kl/k1")
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, args.target_kl, args.kl_horizon, count)

    def learn_from(self, episodes: Episodes, scores: list[Score]) -> PPOExperience:
        outputs = self.outputs_of(episodes)
        found = build_experience(episodes, outputs, scores, self.kl_coef, self.args, self.add_up)
        self.rollouts.add("kl_coef", self.kl_coef)
        there = found.mask.bool()
        self.rollouts.add_explained("value/explained_variance", found.values[there], found.returns[there])
        return found

    def losses(self, outputs: Outputs, experience: PPOExperience) -> PassLoss:
        args, mask, old = self.args, experience.mask, experience
        policy = policy_losses(outputs.logps, old.logps, old.advantages, args.cliprange, args.dual_clip)
        value = value_losses(outputs.values, old.values, old.returns, args.cliprange_value)
        policy_loss, value_loss = (policy.losses * mask).sum(), (value.losses * mask).sum()
        # arXiv:1707.06347, Eq. 9
        entropy = (outputs.entropy * mask).sum() if self.entropy_learns else 0.0
        # Where the policy does not learn yet, its weights have a gradient of 0: DDP wants one for each of them.
        loss = float(self.policy_learns) * (policy_loss - args.entropy_coef * entropy) + args.vf_coef * value_loss
        with torch.no_grad():
            logged = {
                "loss/policy": policy_loss,
                "loss/value": value_loss,
                "clip_fraction": (policy.clipped * mask).sum(),
                "clip_fraction_value": (value.clipped * mask).sum(),
                "ratio": ((outputs.logps - old.logps).exp() * mask).sum(),
                "kl_to_rollout": (kl_estimates(old.logps, outputs.logps, "k3") * mask).sum(),
            }
        return PassLoss(loss, logged)


def _with_score(peft_config: PeftConfig) -> PeftConfig:
    """The policy's adapter as a value model has it: no LM head has rows of tokens to learn."""
    rows = peft_config.trainable_token_indices
    if isinstance(rows, dict):
        rows = next(iter(rows.values()))
    return dataclasses.replace(peft_config, task_type="SEQ_CLS", trainable_token_indices=rows)
