"""Divides an optimizer step into forward and backward passes of about so many tokens, however its rows are batched.

What a step means is all of its rows: of all accumulation steps and all processes. A pass adds its share of them: of a
loss that is a mean over rows its rows, of a mean over tokens its tokens. So loss, gradient and what is logged do not
depend on how the step is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from alignctl.engine.layout import balanced
from alignctl.engine.row_group import rows_together
from alignctl.errors import RequestError
from alignctl.trainers.base.columns import ROW
from alignctl.trainers.base.everywhere import all_objects, from_all
from alignctl.trainers.base.fitting import Fitting, try_pass
from alignctl.trainers.base.halving import Halving
from alignctl.trainers.base.last_batch import own_rows_of_last
from alignctl.trainers.base.tally import ROWS, Tally, alone, metrics_apart, metrics_of, tokens_of

Batch = dict[str, Any]
PAIR_MEANS = {
    "entropy": "tokens", "mean_token_accuracy": "chosen", "logits/chosen": "chosen", "logits/rejected": "rejected",
}  # fmt: skip
"""Metrics of `trl.DPOTrainer` that are means over tokens."""
_PADDING = {"labels": -100}
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Of flat batches, where sequences begin: for kernels, which otherwise look at positions."""
_PASSES = "passes"


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
    totals: Mapping[str, float] = {}
    """Of the step, or of all held-out rows: counts, and what `before_passes` found, of all processes."""
    fitting: Fitting | None
    halving: Halving
    token_group: ProcessGroup | None = None
    """Processes that compute the rows of all of them together, each a part of every row."""
    weights_group: ProcessGroup | None = None
    """The same, each with a part of the matrices of layers."""
    _tally: Tally | None = None
    """Of the step, until the processes have put it together."""
    row_lengths: list[list[int]]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Of a batch, how many rows it has and whatever else means are over."""
        return {ROWS: len(batch["input_ids"]) // self.blocks}

    def before_passes(self, model: nn.Module, batches: list[Batch], there: Sequence[int]) -> dict[str, float]:
        """Numbers of this process that every pass has to know added up over all of them, by their names. May take out
        of the batches what no pass looks at.

        Args:
            there: How many rows of each batch count.
        """
        return {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._step, self._calls = batches, 0
        self._of_last = self.own_of_last(batches)
        return batches, count

    def own_of_last(self, batches: list[Batch]) -> int | None:
        """How many rows of the last of some batches are this process's; None for all. May take out of the batches what
        no pass looks at."""
        return own_rows_of_last(self, len(self.train_dataset))

    def _get_num_items_in_batch(self, batches: list[Batch], device: torch.device) -> Any:
        """Those of this process, where they are added up with what else the processes ask each other."""
        with alone(self.accelerator) if self._can_divide(batches) else nullcontext():
            return super()._get_num_items_in_batch(batches, device)

    def _can_divide(self, batches: Sequence[Batch]) -> bool:
        return all(can_be_divided(batch, self.blocks) for batch in batches)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        if not self._can_divide(self._step or [inputs]):
            if self.weights_group is not None:
                raise RequestError(
                    "these rows hold more than texts, and processes that divide the matrices of layers could not show "
                    "them to each other",
                    "leave out `distributed.parallelism_config.tp_size`",
                )
            self._fit(model, [inputs], None)
            return super().training_step(model, inputs, num_items_in_batch)
        self._calls += 1
        if self._calls < len(self._step):
            return torch.zeros((), device=self.args.device)
        # On the CPU, where looking at each row does not wait for the device.
        batches, self._step = [send_to_device(batch, "cpu") for batch in self._step], []
        there = [len(batch["input_ids"]) // self.blocks for batch in batches]
        if self._of_last is not None and not is_flat(batches[-1]):
            there[-1] = self._of_last
        asked = self.before_passes(model, batches, there)
        of_batches = [list(rows_of(batch, self.blocks)) for batch in batches]
        spare = of_batches[0][0]
        if self._of_last is not None:
            of_batches[-1] = of_batches[-1][: rows_there(of_batches[-1], self._of_last, self.row_lengths)]
        rows = [row for batch in of_batches for row in batch]
        if group := self._row_group():
            everyones = all_objects((rows, spare), group)
            rows, spare = [row for own, _ in everyones for row in own], everyones[0][1]
        packed = self._packed()
        costs = [_cost(row, packed) for row in rows]
        if self.keeps_batches:
            self._fit(model, batches[:1], None)
            bounds = list(accumulate(map(len, of_batches), initial=0))
            parts = [list(range(*ends)) for ends in pairwise(bounds) if ends[0] < ends[1]]
            return self._take_step(model, rows, parts, spare, asked, num_items_in_batch)
        self._fit(model, rows, costs)
        return self.halving.compute(
            self,
            str(self.state.global_step + 1),
            self._pass_tokens(),
            lambda tokens: self._take_step(model, rows, self._divided(costs, tokens), spare, asked, num_items_in_batch),
        )

    def _take_step(
        self,
        model: nn.Module,
        rows: Sequence[Batch],
        parts: list[list[int]],
        spare: Batch,
        asked: Mapping[str, float],
        num_items_in_batch: Any,
    ) -> Tensor:
        """Computes the passes of a step.

        Args:
            parts: Rows of each pass. Where other processes have more, some are divided, unless batches are kept.
            spare: A row to compute, for nothing, where there is nothing to divide.
            asked: Numbers to be added up over all processes.
        """
        accelerator = self.accelerator
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        passes, counts = self._passes(rows, parts)
        nothing = dict.fromkeys(counts[0] if counts else self.counts(together([spare])), 0)
        own = {name: sum(one[name] for one in counts) for name in nothing}
        everyone = from_all(accelerator, {**own, **asked, _PASSES: len(passes)})
        self.totals = {name: float(values.sum()) for name, values in everyone.items()}
        most = int(everyone[_PASSES].max())
        if len(passes) < most and not self.keeps_batches:
            passes, counts = self._passes(rows, _into(parts, min(most, len(rows))))
        for _ in range(most - len(passes)):  # processes wait for each other in every pass
            passes.append(together([spare]))
            counts.append(nothing)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.tensor(self.totals["tokens"], device=self.args.device)
        self._tally = Tally(self.means)
        loss = torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = 1  # a pass has its share already
        for number, (part, own) in enumerate(zip(passes, counts, strict=True)):
            last = number == len(passes) - 1
            accelerator.sync_gradients = last  # and DeepSpeed takes its step there
            self.shares = {name: own[name] * accelerator.num_processes / max(self.totals[name], 1) for name in own}
            if own is nothing:
                self.shares = dict.fromkeys(nothing, 1.0)
            with (
                nullcontext() if last or by_deepspeed else accelerator.no_sync(model),
                rows_together(self.models_on_engine(), self.token_group),
                metrics_apart(self, "train") as metrics,
                _for_nothing(accelerator) if own is nothing else nullcontext(),
            ):
                own_loss = super().training_step(model, part, num_items_in_batch)
            self.shares = None
            if own is not nothing:
                loss = loss + own_loss
            self._tally.add(metrics, own)
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
            with metrics_apart(self, "train"):
                try_pass(bare, lambda model: self.compute_loss(model, batch))

        fitting.find(self, costs and sum(costs), self._longest, compute)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return self.shared(super().compute_loss(model, inputs, *args, **kwargs), ROWS)

    def shared(self, loss: Tensor, name: str) -> Tensor:
        """What the mean of a pass adds to that of the step."""
        return loss if self.shares is None else loss * self.shares[name]

    def _row_group(self) -> ProcessGroup | None:
        """Processes that compute the same rows, those of all of them."""
        return self.token_group or self.weights_group

    def _divided(self, costs: list[int], tokens: int) -> list[list[int]]:
        return balanced(costs, tokens, padded=not self._packed()) if costs else []

    def _passes(
        self, rows: Sequence[Batch], parts: Sequence[Sequence[int]]
    ) -> tuple[list[Batch], list[dict[str, int]]]:
        """Passes of so many rows each, and what they count."""
        passes = [together([rows[index] for index in sorted(part)]) for part in parts]
        return passes, [self.counts(one) for one in passes]

    def step_numbers(self) -> dict[str, float]:
        """See EndsStepsTogether."""
        found, self._tally = self._tally, None
        return found.numbers() if found else {}

    def take_step_numbers(self, everyone: Mapping[str, Tensor]) -> None:
        """See EndsStepsTogether."""
        if not everyone:
            return
        group = self._row_group()
        self._total_train_tokens += tokens_of(everyone) // (group.size() if group else 1)
        for name, value in metrics_of(everyone).items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def _into(parts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Parts divided until there are so many."""
    parts = list(parts)
    while len(parts) < count:
        longest = max(parts, key=len)
        parts.remove(longest)
        parts += [longest[::2], longest[1::2]]
    return parts


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
