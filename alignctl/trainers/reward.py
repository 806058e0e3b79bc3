"""TRL's RewardTrainer on alignctl's engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl
from torch import nn
from trl.trainer.reward_config import RewardConfig as TRLRewardConfig

from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine


@dataclass
class RewardConfig(EngineConfig, TRLRewardConfig):
    """Settings of reward models."""


class RewardTrainer(Managed, OnEngine, trl.RewardTrainer):
    """Bradley-Terry reward model."""

    blocks = 2

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        row = inputs.pop(ROW, {})
        if "margin" in row:  # where TRL looks for it, and as precise as TRL has it
            inputs["margin"] = self._prepare_input(row["margin"])
        return super().compute_loss(model, inputs, *args, **kwargs)
