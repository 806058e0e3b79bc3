"""IPO in both forms that are in use: the paper's on sums, and the length-normalised one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignctl.trainers.preference.dpo import DPOConfig
from alignctl.trainers.preference.losses import ipo_losses
from alignctl.trainers.preference.pairs import Completions, PairLoss, PairTrainer
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps


@dataclass
class IPOConfig(DPOConfig):
    """Settings of IPO beside those of DPO; `beta` is the paper's tau."""

    normalize: Literal["tokens", "none"] = "tokens"
    """tokens: log-ratios are divided by the number of completion tokens, as in TRL; none: their
    sums, Eq. 17 as printed."""


class IPOTrainer(CachedReferenceLogps, PairTrainer):
    """Identity preference optimization, arXiv:2310.12036."""

    has_reference = True

    def pair_loss(self, chosen: Completions, rejected: Completions, row: Mapping[str, Any]) -> PairLoss:
        chosen_ratios, rejected_ratios = chosen.logps - chosen.ref_logps, rejected.logps - rejected.ref_logps
        rewards = self.beta * chosen_ratios, self.beta * rejected_ratios
        if self.args.normalize == "tokens":
            chosen_ratios = chosen_ratios / chosen.tokens.clamp(min=1)
            rejected_ratios = rejected_ratios / rejected.tokens.clamp(min=1)
        return PairLoss(ipo_losses(chosen_ratios, rejected_ratios, self.beta).mean(), *rewards, metrics={})
