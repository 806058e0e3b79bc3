"""SimPO: no reference; the reward is the mean log-probability of a completion's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignctl.trainers.preference.dpo import DPOConfig
from alignctl.trainers.preference.losses import simpo_losses
from alignctl.trainers.preference.pairs import Completions, PairLoss, PairTrainer


@dataclass
class SimPOConfig(DPOConfig):
    """Settings of SimPO beside those of DPO."""

    beta: float = 2.0
    """Scales the reward, > 0: larger makes the loss look at small differences."""
    gamma_beta_ratio: float = 0.5
    """Target margin over beta, as papers publish it; gamma itself, TRL's `simpo_gamma`, is ratio * beta."""
    sft_weight: float = 0.0
    """Weight of the likelihood of the chosen completions beside the preference loss; TRL's `cpo_alpha`."""


class SimPOTrainer(PairTrainer):
    """Simple preference optimization, arXiv:2405.14734."""

    has_reference = False

    def pair_loss(self, chosen: Completions, rejected: Completions, row: Mapping[str, Any]) -> PairLoss:
        gamma = self.args.gamma_beta_ratio * self.beta
        losses = simpo_losses(chosen.mean_logps, rejected.mean_logps, self.beta, gamma, self.args.label_smoothing)
        rewards = self.beta * chosen.mean_logps, self.beta * rejected.mean_logps
        return PairLoss(
            losses.mean(), *rewards, metrics={"nll_loss": chosen.nll}, likelihood_weight=self.args.sft_weight
        )
