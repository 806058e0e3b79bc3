"""ORPO: no reference; the likelihood of the chosen completion plus a weighted odds-ratio term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from alignctl.data.rendering import check_end_is_trained
from alignctl.models.generation import end_tokens
from alignctl.trainers.preference.dpo import DPOConfig
from alignctl.trainers.preference.losses import log_odds_ratio, odds_ratio_losses
from alignctl.trainers.preference.pairs import Completions, PairLoss, PairTrainer

_ROWS = 100


@dataclass
class ORPOConfig(DPOConfig):
    """Settings of ORPO beside those of DPO."""

    beta: float = 0.1
    """Weight of the odds-ratio term, lambda in the paper."""
    prompt_loss: bool = True
    """Whether the likelihood is of prompt and chosen completion (TRL, the authors' code) or of the completion alone
    (the paper's Eq. 6)."""


class ORPOTrainer(PairTrainer):
    """Odds ratio preference optimization, arXiv:2403.07691."""

    has_reference = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        answers = [row["chosen_ids"] for row in islice(self.train_dataset, _ROWS)]
        ends = end_tokens(self.accelerator.unwrap_model(self.model), self.processing_class)
        check_end_is_trained(ends, self.processing_class, answers)

    def scored(self, inputs: dict[str, Tensor]) -> Tensor:
        if not self.args.prompt_loss:
            return inputs["completion_mask"]
        (chosen, _), (_, rejected) = inputs["attention_mask"].chunk(2), inputs["completion_mask"].chunk(2)
        return torch.cat([chosen, rejected])

    def pair_loss(self, chosen: Completions, rejected: Completions, row: Mapping[str, Any]) -> PairLoss:
        preference = odds_ratio_losses(chosen.mean_logps, rejected.mean_logps).mean()
        return PairLoss(
            self.beta * preference,
            self.beta * chosen.mean_logps,
            self.beta * rejected.mean_logps,
            metrics={
                "nll_loss": chosen.nll,
                "log_odds": log_odds_ratio(chosen.mean_logps, rejected.mean_logps).mean(),
            },
            likelihood_weight=1.0,
        )
