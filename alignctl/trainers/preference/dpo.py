"""TRL's DPOTrainer on alignctl's engine, and its precomputed reference log-probabilities kept on disk."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig

from alignctl.trainers.base.held_out import Part
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.base.passes import PAIR_MEANS, pair_counts
from alignctl.trainers.base.tally import ROWS
from alignctl.trainers.base.tokenising import TokenisesPairs
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps

_LIKELIHOOD = "sft"


@dataclass
class DPOConfig(EngineConfig, TRLDPOConfig):
    """Settings of DPO."""


class DPOTrainer(Managed, CachedReferenceLogps, OnEngine, TokenisesPairs, trl.DPOTrainer):
    """Direct preference optimization, arXiv:2305.18290."""

    blocks = 2
    has_reference = True
    means = PAIR_MEANS

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        return super().counts(batch) | pair_counts(batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.shares is None or _LIKELIHOOD not in self.loss_types:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kept, more = self.loss_weights, self.shares["chosen"] / self.shares[ROWS]
        self.loss_weights = [w * more if t == _LIKELIHOOD else w for t, w in zip(self.loss_types, kept, strict=True)]
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = kept

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        """The loss `sft` is a mean over tokens, the others over pairs."""
        if _LIKELIHOOD not in self.loss_types:
            return super().held_out_parts(model, loss, inputs)
        likelihood = self._likelihood_of(model, inputs)
        tokens = inputs["completion_mask"].chunk(2)[0][:, 1:].sum()
        return [*super().held_out_parts(model, loss - likelihood, inputs), (likelihood, tokens)]

    @torch.no_grad()
    def _likelihood_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss `sft` of a batch by itself: TRL gives only the sum of all."""
        kept = self.loss_types, self.loss_weights, self._metrics
        weight = sum(w for name, w in zip(self.loss_types, self.loss_weights, strict=True) if name == _LIKELIHOOD)
        self.loss_types, self.loss_weights, self._metrics = [_LIKELIHOOD], [weight], {"eval": defaultdict(list)}
        try:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(inputs))
        finally:
            self.loss_types, self.loss_weights, self._metrics = kept
