"""TRL's RewardTrainer on alignctl's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl
from torch import nn
from trl.trainer.reward_config import RewardConfig as TRLRewardConfig

from alignctl.data.token_columns import ScoredIds, TokenColumns
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.entries import KeepsPromptsTogether
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.base.tokenising import TokenisesRows


@dataclass
class RewardConfig(EngineConfig, TRLRewardConfig):
    """Settings of reward models."""


class RewardTrainer(KeepsPromptsTogether, Managed, OnEngine, TokenisesRows, trl.RewardTrainer):
    """Bradley-Terry reward model; all pairs of a prompt are one entry of a batch."""

    blocks = 2

    @classmethod
    def token_columns(cls, args: RewardConfig, *more: Any) -> TokenColumns:
        return ScoredIds(args.max_length)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        row = inputs.pop(ROW, {})
        if "margin" in row:  # where TRL looks for it, and as precise as TRL has it
            inputs["margin"] = self._prepare_input(row["margin"])
        return super().compute_loss(model, inputs, *args, **kwargs)
