"""TRL's RewardTrainer on alignctl's engine."""

from __future__ import annotations

from dataclasses import dataclass

import trl
from trl.trainer.reward_config import RewardConfig as TRLRewardConfig

from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine


@dataclass
class RewardConfig(EngineConfig, TRLRewardConfig):
    """Settings of reward models."""


class RewardTrainer(Managed, OnEngine, trl.RewardTrainer):
    """Bradley-Terry reward model."""

    blocks = 2
