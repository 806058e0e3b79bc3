"""The held-out loss: what the loss of one optimizer step over all held-out rows would be.

transformers (5.23) takes the mean of the losses of batches, weighing a batch as if it were full; the last one is filled
up with rows that were there before, and of a loss that is a mean over tokens a short batch counts as much as a long
one. So its number depends on the batch size and on the processes. Here each part of a loss is weighed by what it is a
mean over, and a row counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from alignctl.errors import NotANumber, RequestError

Part = tuple[Tensor, int | Tensor]
"""Of a batch's loss: a scalar, and how many rows or tokens it is a mean over."""
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class HeldOutLoss:
    """Mixin before a class of transformers or TRL."""

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        """What the loss of a batch is the sum of. A mean over rows, unless a trainer says otherwise."""
        return [(loss, len(inputs["input_ids"]))]

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As many batches for each process, of the same sizes: what a loss gathers has the same shape everywhere."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        args, accelerator = self.args, self.accelerator
        order = list(self._get_eval_sampler(rows) or range(len(rows)))
        return DataLoader(
            self._remove_unused_columns(rows, "Evaluation"),
            batch_sampler=Share(order, args.eval_batch_size, accelerator.num_processes, accelerator.process_index),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)
        parts = self.held_out_parts(model, found[0], inputs)
        self._held_out.append(torch.tensor([[float(value), float(count)] for value, count in parts]).double())
        return found

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._held_out: list[Tensor] = []
        with _no_dataloader(self.accelerator):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        values, counts = torch.stack(self._held_out).unbind(-1)  # [batches, parts] each
        if dataloader.batch_sampler.repeats:
            counts[-1] = 0
        device = self.args.device
        sums, totals = self.accelerator.reduce(torch.stack([(values * counts).sum(0), counts.sum(0)]).to(device), "sum")
        output.metrics[f"{metric_key_prefix}_loss"] = float((sums / totals.clamp(min=1)).sum())
        self._weigh_metrics(self.accelerator.reduce(counts[:, 0].to(device), "sum").cpu())
        return output

    def _weigh_metrics(self, counts: Tensor) -> None:
        """Replaces what TRL's trainers have of each batch, and take the mean of when they log, by the mean in which a
        batch counts what its loss does."""
        for values in getattr(self, "_metrics", {}).get("eval", {}).values():
            if len(values) == len(counts) > 1:
                values[:] = [float((torch.tensor(values).double() * counts).sum() / counts.sum().clamp(min=1))]

    def held_out_loss(self) -> float:
        """The loss by itself: nothing is logged, and nobody is told, as of an evaluation while training."""
        logged = getattr(self, "_metrics", {}).get("eval", {})
        output = self.evaluation_loop(self.get_eval_dataloader(), "held-out loss", prediction_loss_only=True)
        logged.clear()
        return output.metrics["eval_loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers does, with a loss that is a number.

        Raises:
            NotANumber: The loss, or the metric that the best model is chosen by, is none.
            RequestError: There is no such metric.
        """
        metrics = super().evaluate(*args, **kwargs)
        wanted = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        for name in ("loss", wanted):
            if not math.isfinite(metrics.get(f"eval_{name}", 0.0)):
                raise NotANumber(f"`{name}` of the held-out rows is not finite")
        if f"eval_{wanted}" not in metrics:
            names = (key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise RequestError(
                f"`metric_for_best_model={wanted}` is not measured on held-out rows while training",
                f"there is {', '.join(sorted(f'`{name}`' for name in names if name not in _SPEED))}",
            )
        return metrics


class Share:
    """The batches of one of several processes: numbers of rows, in the order given.

    Each process has as many rows as the others, and the few that are left are a last batch of one row for each; a
    process for which there is none `repeats` a row that counts for nothing.
    """

    def __init__(self, order: list[int], size: int, processes: int, process: int):
        each = len(order) // processes
        own, left = order[process : each * processes : processes], order[each * processes :]
        self._batches = [own[start : start + size] for start in range(0, each, size)]
        self.repeats = bool(left) and process >= len(left)
        if left:
            self._batches.append([order[0] if self.repeats else left[process]])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def _no_dataloader(accelerator: Accelerator) -> Iterator[None]:
    """With nothing for accelerate to cut off: it would do so by the training rows, if those are being gone through."""
    state = accelerator.gradient_state
    gone_through, state.dataloader_references = state.dataloader_references, [None]
    try:
        yield
    finally:
        state.dataloader_references = gone_through
