"""Divides an optimizer step into forward and backward passes of about so many tokens, however its rows are batched.

What a step means is all of its rows: of all accumulation steps and all processes. A pass adds its share of them: of a
loss that is a mean over rows its rows, of a mean over tokens its tokens. So loss, gradient and what is logged do not
depend on how the step is divided.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor, nn

from alignctl.engine.layout import balanced
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.everywhere import largest
from alignctl.trainers.base.fitting import Fitting, try_pass
from alignctl.trainers.base.halving import Halving

Batch = dict[str, Any]
ROWS = "rows"
"""Name of the count that a mean is over, unless a trainer says otherwise."""
PAIR_MEANS = {
    "entropy": "tokens", "mean_token_accuracy": "chosen", "logits/chosen": "chosen", "logits/rejected": "rejected",
}  # fmt: skip
"""Metrics of `trl.DPOTrainer` that are means over tokens."""
_PADDING = {"labels": -100}
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Of flat batches, where sequences begin: for kernels, which otherwise look at positions."""
_ENDS = {"min_reward": min, "max_reward": max}


class DividesSteps:
    """Mixin before one of TRL's trainers, after what looks at a step's loss and batches.

    transformers calls `training_step` once for each of the batches of a step; here all but the last call do nothing,
    and the last one makes the passes.
    """

    blocks: int
    keeps_batches: str | None = None
    """Why the rows of a batch have to stay together; None where they need not."""
    means: Mapping[str, str] = {}
    """Metrics that are means over something else than rows: the name of its count."""
    shares: Mapping[str, float] | None = None
    """While a pass is computed, which part of the step it has, by the names of counts; times the processes, over which
    gradients are averaged."""
    fitting: Fitting | None
    halving: Halving
    row_lengths: list[list[int]]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Of a batch, how many rows it has and whatever else means are over."""
        return {ROWS: len(batch["input_ids"]) // self.blocks}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._step, self._calls = batches, 0
        self._of_last = self._rows_of_last()
        return batches, count

    def _rows_of_last(self) -> int | None:
        """How many rows of the step's last batch are this process's: where the rows of an epoch do not fill the batches
        of all processes, accelerate fills the last ones with rows that were trained on already. None where all are."""
        accelerator, args = self.accelerator, self.args
        together = accelerator.num_processes * args.train_batch_size
        left = len(self.train_dataset) % together
        filled = args.accelerator_config.even_batches and not args.dataloader_drop_last
        if not (filled and left and accelerator.num_processes > 1 and accelerator.gradient_state.end_of_dataloader):
            return None
        return min(max(left - accelerator.process_index * args.train_batch_size, 0), args.train_batch_size)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        if self.keeps_batches or not all(can_be_divided(batch, self.blocks) for batch in self._step or [inputs]):
            self._fit(model, [inputs], None)
            return super().training_step(model, inputs, num_items_in_batch)
        self._calls += 1
        if self._calls < len(self._step):
            return torch.zeros((), device=self.args.device)
        # On the CPU, where looking at each row does not wait for the device.
        batches = [list(rows_of(send_to_device(batch, "cpu"), self.blocks)) for batch in self._step]
        self._step = []
        spare = batches[0][0]
        if self._of_last is not None:
            batches[-1] = batches[-1][: rows_there(batches[-1], self._of_last, self.row_lengths)]
        rows = [row for batch in batches for row in batch]
        packed = self._packed()
        costs = [_cost(row, packed) for row in rows]
        self._fit(model, rows, costs)
        return self.halving.compute(
            self,
            str(self.state.global_step + 1),
            self._pass_tokens(),
            lambda tokens: self._take_step(model, self._passes(rows, costs, tokens), spare, num_items_in_batch),
        )

    def _take_step(self, model: nn.Module, passes: list[Batch], spare: Batch, num_items_in_batch: Any) -> Tensor:
        """Computes the passes of a step.

        Args:
            spare: A row to compute, for nothing, where others have more passes.
        """
        accelerator = self.accelerator
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        counts = [self.counts(one) for one in passes]
        nothing = dict.fromkeys(counts[0] if counts else self.counts(together([spare])), 0)
        totals = self._added_up({name: sum(one[name] for one in counts) for name in nothing})
        if num_items_in_batch is not None and self._of_last is not None:
            num_items_in_batch = torch.tensor(totals["tokens"], device=self.args.device)
        for _ in range(largest(accelerator, len(passes)) - len(passes)):
            passes.append(together([spare]))
            counts.append(nothing)
        found: list[dict[str, list[float]]] = []
        loss = torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = 1  # a pass has its share already
        for number, (part, own) in enumerate(zip(passes, counts, strict=True)):
            last = number == len(passes) - 1
            accelerator.sync_gradients = last  # and DeepSpeed takes its step there
            self.shares = {
                name: own[name] * accelerator.num_processes / max(total, 1) for name, total in totals.items()
            }
            at_once = last or by_deepspeed
            with (
                nullcontext() if at_once else accelerator.no_sync(model),
                self._metrics_apart() as metrics,
                _for_nothing(accelerator) if own is nothing else nullcontext(),
            ):
                if own is nothing:
                    self.shares = dict.fromkeys(nothing, 1.0)
                own_loss = super().training_step(model, part, num_items_in_batch)
            if own is nothing:
                metrics = {"num_tokens": [0.0]}
            else:
                loss = loss + own_loss
            found.append(metrics)
        self._log_step(found, counts)
        return loss

    def _fit(self, model: nn.Module, rows: list[Batch], costs: list[int] | None) -> None:
        """Finds in a rehearsal what fits.

        Args:
            rows: Of the step; a batch where it stays together, and has no `costs`.
        """
        fitting, self.fitting = self.fitting, None
        if fitting is None:
            return
        bare = self.accelerator.unwrap_model(model)

        def compute(tokens: int | None) -> None:
            parts = [[0]] if costs is None else self._divided(costs, tokens)
            heaviest = max(parts, key=lambda part: sum(costs[index] for index in part) if costs else 0)
            batch = rows[0] if costs is None else together([rows[index] for index in heaviest])
            batch = self._prepare_inputs(batch)
            with self._metrics_apart():
                try_pass(bare, lambda model: self.compute_loss(model, batch))

        fitting.find(self, costs and sum(costs), self._longest, compute)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return self.shared(super().compute_loss(model, inputs, *args, **kwargs), ROWS)

    def shared(self, loss: Tensor, name: str) -> Tensor:
        """What the mean of a pass adds to that of the step."""
        return loss if self.shares is None else loss * self.shares[name]

    def _divided(self, costs: list[int], tokens: int) -> list[list[int]]:
        return balanced(costs, tokens, padded=not self._packed()) if costs else []

    def _passes(self, rows: Sequence[Batch], costs: list[int], tokens: int) -> list[Batch]:
        parts = self._divided(costs, tokens)
        most = largest(self.accelerator, len(parts))
        while len(parts) < min(most, len(rows)):  # processes wait for each other in every pass
            longest = max(parts, key=len)
            parts.remove(longest)
            parts += [longest[::2], longest[1::2]]
        return [together([rows[index] for index in sorted(part)]) for part in parts]

    def _everywhere(self, names: set[str]) -> set[str]:
        """The names that any process has: in the last step of an epoch one may have no rows."""
        if self.accelerator.num_processes == 1 or self._of_last is None:
            return names
        return set(gather_object(sorted(names)))

    def _added_up(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.args.device)
        return dict(zip(numbers, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    @contextmanager
    def _metrics_apart(self) -> Iterator[dict[str, list[float]]]:
        """The metrics of a pass by themselves, of this process alone: others have passes of other sizes, and what a
        step came to is put together once."""
        accelerator, tokens = self.accelerator, self._total_train_tokens
        accelerator.gather = accelerator.gather_for_metrics = lambda values, *args, **kwargs: values
        kept, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            yield self._metrics["train"]
        finally:
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens - tokens]
            self._metrics["train"], self._total_train_tokens, self.shares = kept, tokens, None
            del accelerator.gather, accelerator.gather_for_metrics

    def _log_step(self, found: list[dict[str, list[float]]], counts: list[dict[str, int]]) -> None:
        """Adds what the passes of a step found to the metrics: one number a step, of all processes."""
        # What is left out here is made of the others below, and of single completions not every pass has it.
        names = self._everywhere({name for metrics in found for name in metrics}) - {"num_tokens", "rewards/margins"}
        sums: dict[str, float] = {}
        for name in sorted(names - _ENDS.keys() | self.means.keys()):  # the same in every process
            seen = [
                (one[name][-1], own[self.means.get(name, ROWS)])
                for one, own in zip(found, counts, strict=True)
                if name in one
            ]
            sums[name], sums[f"{name} of"] = (
                sum(value * count for value, count in seen),
                sum(count for _, count in seen),
            )
        sums["num_tokens"] = sum(one["num_tokens"][0] for one in found)
        sums = self._added_up(sums)
        self._total_train_tokens += sums["num_tokens"]
        values = {name: sums[name] / of for name in sums if (of := sums.get(f"{name} of"))}
        for name in sorted(names & _ENDS.keys()):
            nobodys = -math.inf if _ENDS[name] is max else math.inf
            own = torch.tensor(
                [_ENDS[name]((one[name][-1] for one in found if name in one), default=nobodys)], device=self.args.device
            )
            values[name] = _ENDS[name](self.accelerator.gather(own).tolist())
        if {"rewards/chosen", "rewards/rejected"} <= values.keys():
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        for name, value in values.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


@contextmanager
def _for_nothing(accelerator: Accelerator) -> Iterator[None]:
    """With gradients that are 0."""
    backward = accelerator.backward
    accelerator.backward = lambda loss, *args, **kwargs: backward(loss * 0.0, *args, **kwargs)
    try:
        yield
    finally:
        del accelerator.backward


def rows_there(rows: Sequence[Batch], count: int, lengths: list[list[int]]) -> int:
    """How many pieces of a batch, or sequences of a flat one, its first `count` rows are.

    Args:
        lengths: Of the rows of the step's flat batches, in tokens.
    """
    if not is_flat(rows[0]):
        return count
    if not lengths:  # a row each
        return len(rows) if count else 0
    tokens, seen = sum(lengths[-1][:count]), list(accumulate(row["input_ids"].size(1) for row in rows))
    return sum(1 for so_far in seen if so_far <= tokens)


def pair_counts(batch: Batch) -> dict[str, int]:
    """Tokens of the completions of pairs: chosen, rejected, both."""
    chosen, rejected = (int(part[:, 1:].sum()) for part in batch["completion_mask"].chunk(2))
    return {"chosen": chosen, "rejected": rejected, "tokens": chosen + rejected}


def is_flat(batch: Batch) -> bool:
    """Whether its sequences lie one behind another, without padding; positions begin anew with each."""
    return "attention_mask" not in batch and "position_ids" in batch and len(batch["input_ids"]) == 1


def can_be_divided(batch: Batch, blocks: int) -> bool:
    """Whether everything in a batch belongs to single rows of it."""
    if is_flat(batch):
        shape = batch["input_ids"].shape
        return all(key in _BOUNDS or getattr(value, "shape", None) == shape for key, value in batch.items())
    size = len(batch["input_ids"]) // blocks
    lies = (isinstance(value, list | Tensor) and len(value) in (size, blocks * size) for key, value in batch.items())
    return "attention_mask" in batch and all(key == ROW or is_so for key, is_so in zip(batch, lies, strict=True))


def rows_of(batch: Batch, blocks: int) -> Iterator[Batch]:
    """The rows of a batch: its sequences as `[blocks, length]`, numbers and whatever else by itself. Of a flat one its
    sequences, `[1, length]`.

    Args:
        blocks: The batch is so many blocks of rows, of which the first ones are a row, the second ones, and so on.
    """
    if is_flat(batch):
        starts = (batch["position_ids"][0, 1:] == 0).nonzero().flatten() + 1
        pieces = {key: value.tensor_split(starts, dim=1) for key, value in batch.items() if key not in _BOUNDS}
        yield from (dict(zip(pieces, row, strict=True)) for row in zip(*pieces.values(), strict=True))
        return
    size = len(batch["input_ids"]) // blocks
    sequences = {key: value.unflatten(0, (blocks, size)) for key, value in batch.items() if _are_sequences(value)}
    others = {key: value for key, value in batch.items() if key not in sequences and key != ROW}
    for index in range(size):
        row = {key: value[:, index] for key, value in sequences.items()}
        row |= {key: value[index] for key, value in others.items()}
        yield row | ({ROW: {key: value[index] for key, value in batch[ROW].items()}} if ROW in batch else {})


def together(rows: Sequence[Batch]) -> Batch:
    """Rows as a batch, padded on the right to the longest of them, or flat as they were."""
    if is_flat(rows[0]):
        return {key: torch.cat([row[key] for row in rows], 1) for key in rows[0]}
    longest = max(int(row["attention_mask"].any(0).nonzero().max()) + 1 for row in rows)
    batch: Batch = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if key == ROW:
            batch[ROW] = {name: _stacked([value[name] for value in values]) for name in first}
        elif _are_sequences(first):
            batch[key] = torch.stack([_padded(value, longest, _PADDING.get(key, 0)) for value in values], 1).flatten(
                0, 1
            )
        else:
            batch[key] = _stacked(values)
    return batch


def _are_sequences(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _padded(sequences: Tensor, length: int, padding: int) -> Tensor:
    return F.pad(sequences[:, :length], (0, max(length - sequences.size(1), 0)), value=padding)


def _stacked(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values


def _cost(row: Batch, packed: bool) -> int:
    """Tokens that a row takes: packed, those that its sequences begin with in common once."""
    if is_flat(row):
        return row["input_ids"].size(1)
    lengths = row["attention_mask"].sum(1)
    if not packed:
        return int(lengths.max()) * len(lengths)
    least, ids = int(lengths.min()), row["input_ids"]
    shared = int((ids[:1, :least] == ids[:, :least]).all(0).long().cumprod(0).sum())
    return int(lengths.sum()) - shared * (len(lengths) - 1)
