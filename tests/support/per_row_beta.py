"""A method of one's own with a column of the rows: DPO whose beta each pair says itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from alignctl.errors import RequestError
from alignctl.methods.registry import RowColumn, methods
from alignctl.trainers.preference.pairs import Completions, PairLoss, PairTrainer
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps


class PerRowBetaTrainer(CachedReferenceLogps, PairTrainer):
    """arXiv:2305.18290, Eq. 7, with the beta of each row."""

    has_reference = True

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if "beta" not in self.row_columns:
            raise RequestError("every pair needs a `beta`, and the rows have no such column")

    def pair_loss(self, chosen: Completions, rejected: Completions, row: Mapping[str, Any]) -> PairLoss:
        rewards = row["beta"] * (chosen.logps - chosen.ref_logps), row["beta"] * (rejected.logps - rejected.ref_logps)
        return PairLoss(-F.logsigmoid(rewards[0] - rewards[1]).mean(), *rewards, metrics={})


METHOD = dataclasses.replace(
    methods()["ipo"],
    name="per_row_beta",
    row_columns=(RowColumn(name="beta", number=True, missing=None),),
    trainer=f"{__name__}:PerRowBetaTrainer",
)
