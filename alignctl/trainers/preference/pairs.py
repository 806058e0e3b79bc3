"""Preference trainers with losses of our own, on the data path of TRL's stable DPOTrainer.

What of TRL is used here, and what a change there would break: the batch of its collator (chosen rows above rejected
ones), `model(..., labels=, fused_lm_head=True).log_probs`, `compute_ref_log_probs`, and the metrics of `log`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.dpo_config import DPOConfig

from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.held_out import Part
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.base.on_engine import OnEngine
from alignctl.trainers.base.tally import ROWS
from alignctl.trainers.base.tokenising import TokenisesPairs


@dataclass(frozen=True)
class Completions:
    """One side of a batch of pairs, the chosen or the rejected completions."""

    logps: Tensor
    """`[batch]`"""
    tokens: Tensor
    """`[batch]`"""
    ref_logps: Tensor | None
    """`[batch]`, without gradient; None without a reference."""
    nll: Tensor
    """Scalar: mean negative log-probability of all scored tokens of this side."""
    scored_tokens: Tensor
    """Scalar: their number."""

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.tokens.clamp(min=1)


@dataclass(frozen=True)
class PairLoss:
    """What a method makes of a batch."""

    loss: Tensor
    """Scalar: the part that is a mean over pairs."""
    chosen_rewards: Tensor
    """`[batch]`, the method's implicit reward."""
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]
    """Scalars to log beside the usual ones."""
    likelihood_weight: float = 0.0
    """Weight of the other part, `nll` of the chosen completions, a mean over tokens."""


class PairTrainer(Managed, OnEngine, TokenisesPairs, trl.DPOTrainer):
    """A DPOTrainer whose loss a subclass gives."""

    blocks = 2
    logs_tokens = False
    means = {"nll_loss": "scored"}

    has_reference: bool
    """Without one no reference is loaded or computed."""

    def __init__(self, *, args: DPOConfig, peft_config: Any = None, **kwargs: Any):
        if not self.has_reference and peft_config is None:
            args.precompute_ref_log_probs = True  # else DPOTrainer loads one; see _precompute_ref_logps
        super().__init__(args=args, peft_config=peft_config, **kwargs)

    @abstractmethod
    def pair_loss(self, chosen: Completions, rejected: Completions, row: Mapping[str, Any]) -> PairLoss:
        """The loss of a batch and its parts.

        Args:
            row: The columns that the method declares and the rows have, by name: numbers float32 `[batch]`, or a list.
        """

    def scored(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mask `[2 * batch, length]` of the tokens that count for `Completions.nll`: those of the completions."""
        return inputs["completion_mask"]

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        return super().counts(batch) | {"scored": int(self.scored(batch).chunk(2)[0][:, 1:].sum())}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self._compute_loss(model, inputs, return_outputs)  # which has its share already

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(dataset, name, batch_size) if self.has_reference else dataset

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        row = inputs.pop(ROW, {})
        scored = self.scored(inputs)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=inputs["input_ids"].masked_fill(scored == 0, -100),
            fused_lm_head=True,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        scored, completion = scored[:, 1:], inputs["completion_mask"][:, 1:]
        per_token_logps = outputs.log_probs[:, -scored.size(1) :]  # prompt tuning puts positions in front
        chosen, rejected = (
            Completions(
                logps=(per_token * mask).sum(1),
                tokens=mask.sum(1),
                ref_logps=reference,
                nll=-per_token.sum() / counted.sum().clamp(min=1),
                scored_tokens=counted.sum(),
            )
            for per_token, mask, counted, reference in zip(
                per_token_logps.chunk(2), completion.chunk(2), scored.chunk(2), self._reference(inputs), strict=True
            )
        )
        result = self.pair_loss(chosen, rejected, row)
        self._record(result, chosen, rejected, inputs["attention_mask"])
        self._likelihood = (result.likelihood_weight * chosen.nll, chosen.scored_tokens)
        loss = result.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        loss = self.shared(loss, ROWS) + self.shared(self._likelihood[0], "scored")
        return (loss, outputs) if return_outputs else loss

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        return [*super().held_out_parts(model, loss - self._likelihood[0], inputs), self._likelihood]

    def _reference(self, inputs: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities of chosen and rejected completions under the reference, if there is one."""
        if not self.has_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    @torch.no_grad()
    def _record(self, result: PairLoss, chosen: Completions, rejected: Completions, attention_mask: Tensor) -> None:
        """Adds to the metrics that `log` averages, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        margins = result.chosen_rewards - result.rejected_rewards
        values = {
            "rewards/chosen": result.chosen_rewards,
            "rewards/rejected": result.rejected_rewards,
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
            "logps/chosen": chosen.logps,
            "logps/rejected": rejected.logps,
            **result.metrics,
        }
        for name, value in values.items():
            self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(attention_mask.sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
