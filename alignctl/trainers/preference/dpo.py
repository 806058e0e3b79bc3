"""TRL's DPOTrainer on alignctl's engine, and its precomputed reference log-probabilities kept on disk."""

from __future__ import annotations

from dataclasses import dataclass

import trl
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig

from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps


@dataclass
class DPOConfig(EngineConfig, TRLDPOConfig):
    """Settings of DPO."""


class DPOTrainer(Managed, CachedReferenceLogps, OnEngine, trl.DPOTrainer):
    """Direct preference optimization, arXiv:2305.18290."""

    blocks = 2
