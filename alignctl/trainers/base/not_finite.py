"""Stops training where loss, gradient or weights are no longer numbers, and knows the rows it happened on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignctl.errors import NotANumber


@dataclass(frozen=True)
class Trouble:
    """A step with a number that is none."""

    step: int
    """Optimizer step, counted from 1."""
    loss: float
    """Of this process's part of the batch."""
    grad_norm: float | None
    """Of all processes together, before it is clipped."""
    learning_rate: float
    rows: list[int]
    """Row numbers of the batch; empty where a trainer has packed or otherwise lost them."""
    texts: list[str]
    """What the batch says, where its rows are not known."""


class NotFinite(Exception):
    """Training came to a loss, gradient or weight that is NaN or infinite."""

    def __init__(self, what: str, step: int, troubles: list[Trouble]):
        """Takes what is not finite, the step, and what each process saw that saw something."""
        super().__init__(what)
        self.what = what
        self.step = min((trouble.step for trouble in troubles), default=step)
        self.troubles = troubles


class StopsWhenNotFinite:
    """Mixin before CarriesRowColumns, CompleteCheckpoints and a transformers Trainer: raises NotFinite, in all
    processes at the same step.

    The norm of the gradient is one number for all processes and is looked at before every optimizer step. A loss is a
    process's own: what it was at the first step with a bad one is remembered until all of them meet, when the mean is
    logged or a checkpoint is saved. Both are read from the device in one go, once a step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._batches: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._trouble: Trouble | None = None
        self.own_loss = 0.0
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._batches, self._losses = batches, []
        return batches, count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except NotANumber as error:  # of drawing; what the others draw is as bad, and they need not be asked
            trouble = self._describe(math.nan, None)
            raise NotFinite("a logit to draw from", trouble.step, [trouble]) from error
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # under FSDP2
        loss = torch.stack(self._losses).sum().float()
        loss, value = torch.stack([loss, torch.as_tensor(0.0 if norm is None else norm).to(loss)]).tolist()
        self.own_loss = loss
        # A scaler of float16 looks for gradients that are too large itself, and tries again with a smaller scale.
        scaled = self.accelerator.mixed_precision == "fp16"
        if not math.isfinite(loss) or not (math.isfinite(value) or scaled):
            self._trouble = self._trouble or self._describe(loss, None if norm is None else value)
        if not (math.isfinite(value) or scaled):
            self._stop("the gradient")
        return norm if norm is None else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop("the loss")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        bad = torch.tensor([self._trouble is not None, not self._weights_are_finite()], device=self.args.device)
        losses, weights = self.accelerator.reduce(bad.float(), "sum").tolist()
        if losses or weights:
            self._stop("the loss" if losses else "a weight")
        super()._save_checkpoint(model, trial)

    def _weights_are_finite(self) -> bool:
        """Looks at this process's part of the trained weights."""
        parts = [getattr(weight, "ds_tensor", weight) for weight in self.model.parameters() if weight.requires_grad]
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
        ends = [end.float() for part in parts if part.numel() for end in part.detach().aminmax()]
        return not ends or bool(torch.stack(ends).isfinite().all())

    def _stop(self, what: str) -> None:
        self.finish_checkpoint()
        troubles = gather_object([self._trouble] if self._trouble else [])
        raise NotFinite(what, self.state.global_step, troubles)

    def _describe(self, loss: float, grad_norm: float | None) -> Trouble:
        rows = [number for numbers in self.row_numbers for number in numbers.tolist()]
        tokens = [] if rows else [ids for batch in self._batches for ids in batch.get("input_ids", [])]
        texts = [self.processing_class.decode(ids, skip_special_tokens=True) for ids in tokens]
        return Trouble(self.state.global_step + 1, loss, grad_norm, self._get_learning_rate(), rows, texts)
