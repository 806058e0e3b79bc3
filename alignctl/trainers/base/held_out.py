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

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from alignctl.engine.tensor_parallel import place_among_rows
from alignctl.errors import NotANumber, RequestError
from alignctl.trainers.base.everywhere import from_all
from alignctl.trainers.base.tally import ROWS, Tally, metrics_apart, metrics_of

Part = tuple[Tensor, int | Tensor]
"""Of a batch's loss: a scalar, and how many rows or tokens it is a mean over."""
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class HeldOutLoss:
    """Mixin before DividesSteps and one of TRL's trainers. Metrics count as the loss does."""

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        """What the loss of a batch is the sum of. A mean over rows, unless a trainer says otherwise."""
        return [(loss, len(inputs["input_ids"]))]

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As many batches for each process, of the same sizes: what a loss gathers has the same shape everywhere."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        args = self.args
        order = list(self._get_eval_sampler(rows) or range(len(rows)))
        return DataLoader(
            self._remove_unused_columns(rows, "Evaluation"),
            batch_sampler=Share(
                order, args.eval_batch_size, *place_among_rows(self.accelerator.unwrap_model(self.model))
            ),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def before_evaluation(self, model: nn.Module, batches: DataLoader) -> None:
        """Is called with the model as it is evaluated, before the first batch."""

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._held_out:
            self.before_evaluation(model, self._batches)
        counts = self.counts(inputs)
        if len(self._held_out) == len(self._batches) - 1 and self._batches.batch_sampler.repeats:
            counts = dict.fromkeys(counts, 0)
        with metrics_apart(self, "eval") as metrics:
            found = super().prediction_step(model, inputs, *args, **kwargs)
            parts = self.held_out_parts(model, found[0], inputs)
        self._of_batches.add(metrics, counts)
        weighed = counts[ROWS] > 0
        self._held_out.append([(float(value), float(count) * weighed) for value, count in parts])
        return found

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._held_out: list[list[tuple[float, float]]] = []
        self._batches, self._of_batches = dataloader, Tally(self.means)
        with _no_dataloader(self.accelerator):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        numbers = self._of_batches.numbers()
        parts = list(zip(*self._held_out, strict=True))  # [parts][batches]
        for number, batches in enumerate(parts):
            numbers[f"part {number}"] = sum(value * count if count else 0.0 for value, count in batches)
            numbers[f"part {number} of"] = sum(count for _, count in batches)
        everyone = from_all(self.accelerator, numbers)
        sums = [[float(everyone[f"part {n}{of}"].sum()) for of in ("", " of")] for n in range(len(parts))]
        output.metrics[f"{metric_key_prefix}_loss"] = sum(value / max(count, 1.0) for value, count in sums)
        for name, value in metrics_of(everyone).items():
            self._metrics["eval"][name] = [value]
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        return output

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
