"""TRL's KTOTrainer on alignctl's engine, class weights from the balance of the labels, and rows in a shuffled order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.kto_config import KTOConfig as TRLKTOConfig
from trl.trainer.utils import use_adapter

from alignctl.data.token_columns import AnswerIds, TokenColumns
from alignctl.errors import RequestError
from alignctl.trainers.base.everywhere import from_all
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import EngineConfig, OnEngine
from alignctl.trainers.base.tally import ROWS
from alignctl.trainers.base.tokenising import TokenisesRows, with_others_answers
from alignctl.trainers.preference.reference_logps import CachedReferenceLogps

_KL = "KL divergence"
_LEAST_ROWS = 2
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


class KTOTrainer(Managed, CachedReferenceLogps, OnEngine, TokenisesRows, trl.KTOTrainer):
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

    def before_passes(self, model: nn.Module, batches: list[dict[str, Any]], there: Sequence[int]) -> dict[str, float]:
        """The KL divergence of the rows of this process, added up, where the loss has an estimate of it."""
        asked = super().before_passes(model, batches, there)
        if not self.calculate_KL:
            return asked
        divergences = [
            self._divergence(model, batch)[:count].sum().item() for batch, count in zip(batches, there, strict=True)
        ]
        for batch in batches:
            for name in [name for name in batch if name.startswith("KL_")]:
                del batch[name]
        self.totals = {_KL: sum(divergences), ROWS: sum(there)}  # until those of all processes are known
        return asked | {_KL: self.totals[_KL]}

    def before_evaluation(self, model: nn.Module, batches: DataLoader) -> None:
        """Over all held-out rows, as a step has it of all of its rows."""
        super().before_evaluation(model, batches)
        if not self.calculate_KL:
            return
        divergences = [self._divergence(model, batch) for batch in batches]
        for number in batches.batch_sampler.repeated:
            divergences[number] = divergences[number][:0]
        found = torch.cat(divergences)
        everyone = from_all(self.accelerator, {_KL: float(found.double().sum()), ROWS: len(found)})
        self.totals = {name: float(values.sum()) for name, values in everyone.items()}

    @torch.no_grad()
    def _divergence(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-ratio `[rows]` of policy and reference for prompts with completions of other rows."""
        batch = self._prepare_inputs(batch)
        alone = self.ref_model is None and is_peft_model(self.model)
        whole = self.accelerator.unwrap_model(self.model)
        off = use_adapter(whole, "ref" if "ref" in whole.peft_config else None) if alone else nullcontext()
        with self.compute_loss_context_manager():
            logps = super()._compute_kl_logps(model, batch)
            if self.precompute_ref_logps:
                return logps - batch["ref_KL_logps"]
            with off, disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                return logps - super()._compute_kl_logps(self.model if alone else self.ref_model, batch)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if _KL in self.totals:
            kl = torch.tensor([self.totals[_KL] / max(self.totals[ROWS], 1)], device=self.args.device)
            self._stand_ins = [torch.zeros_like(kl), kl]
            if self.precompute_ref_logps:
                inputs["ref_KL_logps"] = torch.zeros_like(kl)
        return super()._compute_loss(model, inputs, return_outputs)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """What TRL takes the mean of: it asks for the policy's first, and then for the reference's. A batch that is no
        part of anything has an estimate of its own."""
        return self._stand_ins.pop() if _KL in self.totals else super()._compute_kl_logps(model, batch)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        """The completions of other rows are those of the rows of one optimizer step."""
        size, args.per_device_train_batch_size = args.per_device_train_batch_size, self._together
        try:
            return super()._prepare_dataset(dataset, processing_class, args, name)
        finally:
            args.per_device_train_batch_size = size

    @classmethod
    def token_columns(cls, args: KTOConfig, *more: Any) -> TokenColumns:
        return AnswerIds(args.max_length)

    def prepared(self, rows: Dataset, processing_class: Any, args: KTOConfig, *more: Any) -> Dataset:
        """Each row has the completion of the one before it, too, of as many as are together."""
        return with_others_answers(rows, args.per_device_train_batch_size) if self.calculate_KL else rows

    def __init__(self, *, args: KTOConfig, train_dataset: Dataset, **kwargs: Any):
        size = args.per_device_train_batch_size
        self._together = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if args.loss_type == "kto" and self._together < _LEAST_ROWS:
            raise RequestError(
                "KTO estimates the KL divergence from the other rows of an optimizer step, and it has "
                f"{self._together}",
                f"set `per_device_train_batch_size={_LEAST_ROWS}` or more",
            )
        given = args.desirable_weight, args.undesirable_weight
        args.desirable_weight = args.undesirable_weight = 1.0  # TRL wants numbers; which ones is known below
        # Batches are read in order, and the rows of a file may be sorted by label or come pair by pair.
        args.per_device_train_batch_size = max(size, _LEAST_ROWS)  # TRL's estimate is of a batch, and it takes no less
        super().__init__(args=args, train_dataset=train_dataset.shuffle(seed=args.seed), **kwargs)
        args.per_device_train_batch_size = size
        self._train_batch_size = args.train_batch_size
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
    """For people: the balance, the weights, and what the paper recommends where they leave its band."""
    ratio = weights[0] * desirable / (weights[1] * undesirable)
    how = "computed" if computed else "given"
    text = (
        f"{desirable:,} wanted and {undesirable:,} unwanted completions; "
        f"desirable_weight {weights[0]:.4g}, undesirable_weight {weights[1]:.4g} ({how})"
    )
    # Weights are given with a few digits, and 4/3 is one of the values to aim at.
    if not _LEAST - 0.005 <= ratio <= _MOST + 0.005:
        text += (
            f": wanted ones weigh {ratio:.2f} times as much in all, and the KTO paper recommends 1 to 1.33; leave both "
            "weights null to have them computed"
        )
    return text
