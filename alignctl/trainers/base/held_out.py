"""The held-out loss: what the loss of one optimizer step over all held-out rows would be.

transformers (5.23) takes the mean of the losses of batches, weighing a batch as if it were full; the last one is filled
up with rows that were there before, and of a loss that is a mean over tokens a short batch counts as much as a long
one. So its number depends on the batch size and on the processes. Here each part of a loss is weighed by what it is a
mean over, and a row counts once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
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
_OF_SET = "of set "
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class MeasuredLoss:
    """A held-out loss, and how it comes about."""

    value: float
    adds: list[float]
    """What each batch adds to it, in the same order whenever as many processes share the same rows."""


class HeldOutLoss:
    """Mixin before DividesSteps and one of TRL's trainers. Metrics count as the loss does.

    Of held-out rows that are several sets, each has a loss and metrics under its name besides, `eval_maths_loss`, as in
    transformers; they come of the same pass.
    """

    held_out_sets: Mapping[str, Sequence[int]] = MappingProxyType({})
    """Names of sets of the held-out rows, and which rows each has; together they are all."""

    def held_out_parts(self, model: nn.Module, loss: Tensor, inputs: dict[str, Any]) -> list[Part]:
        """What the loss of a batch is the sum of. A mean over rows, unless a trainer says otherwise."""
        return [(loss, len(inputs["input_ids"]))]

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As many batches for each process, of the same sizes: what a loss gathers has the same shape everywhere."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        args, place = self.args, place_among_rows(self.accelerator.unwrap_model(self.model))
        order = list(self._get_eval_sampler(rows) or range(len(rows)))
        sets = (rows is self.eval_dataset and self.held_out_sets) or {"": order}
        members = {name: set(own) for name, own in sets.items()}
        return DataLoader(
            self._remove_unused_columns(rows, "Evaluation"),
            batch_sampler=Shares(
                {
                    name: Share([i for i in order if i in own], args.eval_batch_size, *place)
                    for name, own in members.items()
                    if own
                }
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
        batches, number = self._batches.batch_sampler, len(self._held_out)
        if number in batches.repeated:
            counts = dict.fromkeys(counts, 0)
        with metrics_apart(self, "eval") as metrics:
            found = super().prediction_step(model, inputs, *args, **kwargs)
            parts = self.held_out_parts(model, found[0], inputs)
        self._of_batches.add(metrics, counts)
        self._of_sets[batches.sets[number]].add(metrics, counts)
        weighed = counts[ROWS] > 0
        self._held_out.append([(float(value), float(count) * weighed) for value, count in parts])
        return found

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._held_out: list[list[tuple[float, float]]] = []
        self._batches, self._of_batches = dataloader, Tally(self.means)
        sets = dataloader.batch_sampler.sets
        self._of_sets = {name: Tally(self.means) for name in sets}
        with _no_dataloader(self.accelerator):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        numbers = self._of_batches.numbers() | _summed(self._held_out)
        for name in filter(None, self._of_sets):
            own = [batch for batch, of in zip(self._held_out, sets, strict=True) if of == name]
            own_numbers = self._of_sets[name].numbers() | _summed(own)
            numbers |= {f"{_OF_SET}{name} {key}": value for key, value in own_numbers.items()}
        everyone = from_all(self.accelerator, numbers)
        output.metrics[f"{metric_key_prefix}_loss"] = _loss(everyone)
        for name, value in metrics_of(everyone).items():
            self._metrics["eval"][name] = [value]
        for name in filter(None, self._of_sets):
            start = f"{_OF_SET}{name} "
            own = {key.removeprefix(start): values for key, values in everyone.items() if key.startswith(start)}
            output.metrics[f"{metric_key_prefix}_{name}_loss"] = _loss(own)
            for metric, value in metrics_of(own).items():
                self._metrics["eval"][f"{name}_{metric}"] = [value]
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        return output

    def held_out_losses(self) -> dict[str, MeasuredLoss]:
        """`loss`, and that of each set by its name, `maths_loss`: nothing is logged, and nobody is told, as of an
        evaluation while training."""
        logged = getattr(self, "_metrics", {}).get("eval", {})
        output = self.evaluation_loop(self.get_eval_dataloader(), "held-out loss", prediction_loss_only=True)
        logged.clear()
        losses = {key.removeprefix("eval_"): value for key, value in output.metrics.items()}
        names = {"loss": "", **{f"{name}_loss": name for name in filter(None, self._of_sets)}}
        return {key: MeasuredLoss(losses[key], self._adds_of(name)) for key, name in names.items()}

    def _adds_of(self, name: str) -> list[float]:
        """What each batch of a set, or of all rows, adds to its loss, on all processes; they call it together."""
        sets, processes = self._batches.batch_sampler.sets, self.accelerator.num_processes
        own = [parts for parts, of in zip(self._held_out, sets, strict=True) if name in ("", of)]
        apart, _ = place_among_rows(self.accelerator.unwrap_model(self.model))
        everyone = gather_object([own])[:: processes // apart]  # those between compute the same rows
        batches = [parts for process in everyone for parts in process if any(count for _, count in parts)]
        whole = [max(sum(count for _, count in part), 1.0) for part in zip(*batches, strict=True)]
        return [
            sum(value * count / of for (value, count), of in zip(parts, whole, strict=True) if count)
            for parts in batches
        ]

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


class Shares:
    """The batches of one of several processes, of one set of rows after another."""

    def __init__(self, shares: Mapping[str, Share]):
        self._batches = [batch for share in shares.values() for batch in share]
        self.sets = [name for name, share in shares.items() for _ in range(len(share))]
        """Which set each batch is of."""
        ends = itertools.accumulate(map(len, shares.values()))
        self.repeated = {end - 1 for share, end in zip(shares.values(), ends, strict=True) if share.repeats}
        """Batches that count for nothing."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _summed(held_out: list[list[tuple[float, float]]]) -> dict[str, float]:
    """What a process found in batches, `[batches][parts]`, added up."""
    numbers = {}
    for number, batches in enumerate(zip(*held_out, strict=True)):
        numbers[f"part {number}"] = sum(value * count if count else 0.0 for value, count in batches)
        numbers[f"part {number} of"] = sum(count for _, count in batches)
    return numbers


def _loss(everyone: Mapping[str, Tensor]) -> float:
    """The sum of the parts of a loss, each a mean over all that it is a mean over."""
    sums = {key: float(values.sum()) for key, values in everyone.items() if key.startswith("part ")}
    return sum(value / max(sums[f"{key} of"], 1.0) for key, value in sums.items() if not key.endswith(" of"))


@contextmanager
def _no_dataloader(accelerator: Accelerator) -> Iterator[None]:
    """With nothing for accelerate to cut off: it would do so by the training rows, if those are being gone through."""
    state = accelerator.gradient_state
    gone_through, state.dataloader_references = state.dataloader_references, [None]
    try:
        yield
    finally:
        state.dataloader_references = gone_through
