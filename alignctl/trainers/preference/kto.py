"""TRL's KTOTrainer on alignctl's engine, class weights from the balance of the labels, and rows in a shuffled order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import trl
from datasets import Dataset
from trl.trainer.kto_config import KTOConfig as TRLKTOConfig

from alignctl.errors import RequestError
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps

# Bounds of (desirable_weight * desirable rows) / (undesirable_weight * undesirable rows), arXiv:2402.01306, Eq. 8.
_LEAST, _MOST = 1.0, 4 / 3


@dataclass
class KTOConfig(EngineConfig, TRLKTOConfig):
    """Settings of KTO: those of `trl.KTOConfig`, with weights that need not be given."""

    desirable_weight: float | None = None
    """Weight of the loss of wanted completions; None, with the other one: the rarer class is raised until both weigh
    the same."""
    undesirable_weight: float | None = None
    """Weight of the loss of unwanted completions."""


class KTOTrainer(Managed, CachedReferenceLogps, OnEngine, trl.KTOTrainer):
    """Kahneman-Tversky optimization, arXiv:2402.01306."""

    has_reference = True
    means = {"entropy": "tokens"} | {
        f"{name}/{side}": f"{side} tokens" if name == "logits" else side
        for name in ("rewards", "logps", "logits")
        for side in ("chosen", "rejected")
    }

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        chosen = torch.as_tensor(batch["label"]).bool().tolist()
        tokens = batch["completion_mask"][:, 1:].sum(1).tolist()
        wanted = sum(count for count, is_so in zip(tokens, chosen, strict=True) if is_so)
        return super().counts(batch) | {
            "chosen": sum(chosen), "rejected": len(chosen) - sum(chosen), "tokens": sum(tokens),
            "chosen tokens": wanted, "rejected tokens": sum(tokens) - wanted,
        }  # fmt: skip

    def __init__(self, *, args: KTOConfig, train_dataset: Dataset, **kwargs: Any):
        given = args.desirable_weight, args.undesirable_weight
        args.desirable_weight = args.undesirable_weight = 1.0  # TRL wants numbers; which ones is known below
        # Batches are read in order, and the rows of a file may be sorted by label or come pair by pair.
        super().__init__(args=args, train_dataset=train_dataset.shuffle(seed=args.seed), **kwargs)
        labels = self.train_dataset["label"] or train_dataset["label"]  # of the rows that are not too long
        desirable = sum(labels)
        weights = balanced_weights(desirable, len(labels) - desirable, *given)
        self.desirable_weight, self.undesirable_weight = weights
        self.notices.append(describe_weights(desirable, len(labels) - desirable, weights, given == (None, None)))


def balanced_weights(
    desirable: int, undesirable: int, desirable_weight: float | None, undesirable_weight: float | None
) -> tuple[float, float]:
    """Weights of wanted and unwanted completions. With neither given, the rarer class is raised until both weigh the
    same in all, the lower bound of the paper's Eq. 8; a weight that is given is taken, and the other one is then 1.

    Raises:
        RequestError: One of the classes has no rows.
    """
    if not desirable or not undesirable:
        missing, there = (True, False) if undesirable else (False, True)
        raise RequestError(
            f"all rows that can be used have `label` {str(there).lower()}: KTO needs completions of both kinds",
            f"add rows with `label` {str(missing).lower()}" + ("" if undesirable else ", or imitate them with `sft`"),
        )
    if desirable_weight is None and undesirable_weight is None:
        return max(undesirable / desirable, 1.0), max(desirable / undesirable, 1.0)
    return 1.0 if desirable_weight is None else desirable_weight, (
        1.0 if undesirable_weight is None else undesirable_weight
    )


def describe_weights(desirable: int, undesirable: int, weights: tuple[float, float], computed: bool) -> str:
    """For people: the balance, the weights, and a warning where they leave the paper's band."""
    ratio = weights[0] * desirable / (weights[1] * undesirable)
    how = "computed" if computed else "given"
    text = (
        f"{desirable:,} wanted and {undesirable:,} unwanted completions; "
        f"desirable_weight {weights[0]:.4g}, undesirable_weight {weights[1]:.4g} ({how})"
    )
    # Weights are given with a few digits, and 4/3 is one of the values to aim at.
    if not _LEAST - 0.005 <= ratio <= _MOST + 0.005:
        text = (
            f"warning: {text}: wanted ones weigh {ratio:.2f} times as much in all, and the KTO paper recommends 1 to "
            "1.33; leave both weights null to have them computed"
        )
    return text
