"""Carries a row's own columns to the loss, past a trainer's collator, which knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

ROW = "row"
"""Key of a batch under which its rows' own columns are: `{column: values}`, numbers as float32 `[batch]`, whatever else
as a list. By themselves, since transformers would take a column called `labels` for its own. Without columns there is
no such key."""
ROW_NUMBER = "alignctl: row number"
"""Column of the training rows: which row of the data it was, counted from 1. Of a name that no data has."""
ROW_LENGTHS = "alignctl: row lengths"
"""In a batch whose rows lie one behind another: tokens of each."""

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class CarriesRowColumns:
    """Mixin before a transformers Trainer: batches to train on and to evaluate have what the rows have under `ROW`.

    A trainer whose loss looks at it takes it out of the batch before its model sees the rest.
    """

    def __init__(self, *args: Any, row_columns: Mapping[str, bool] | None = None, **kwargs: Any):
        """`row_columns` are those of the rows beside their texts: by name, whether the values are numbers."""
        self.row_columns = dict(row_columns or {})
        self.row_numbers: list[Tensor] = []  # of the batches of an optimizer step; none where rows are packed
        self.row_lengths: list[list[int]] = []  # of its flat batches, in tokens
        super().__init__(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns
        known += [name for name in (ROW_NUMBER, *self.row_columns) if name not in known]

    def get_train_dataloader(self) -> DataLoader:
        with self._carrying():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._carrying():
            return super().get_eval_dataloader(*args, **kwargs)

    @contextmanager
    def _carrying(self) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = WithRowColumns(collator, self.row_columns)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.row_numbers = [batch.pop(ROW_NUMBER) for batch in batches if ROW_NUMBER in batch]
        self.row_lengths = [batch.pop(ROW_LENGTHS) for batch in batches if ROW_LENGTHS in batch]
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves all to the device. Under DeepSpeed transformers also rounds numbers to the model's precision, and what
        a loss computes with is not to be rounded."""
        rest = super()._prepare_inputs(
            {key: value for key, value in inputs.items() if key not in (ROW, ROW_NUMBER, ROW_LENGTHS)}
        )
        return rest | ({ROW: send_to_device(inputs[ROW], self.args.device)} if ROW in inputs else {})


class WithRowColumns:
    """A collator that hands on columns and row numbers, past one that knows nothing of them."""

    def __init__(self, collator: Collator, columns: Mapping[str, bool]):
        self._collator = collator
        self._columns = columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        taken = {ROW_NUMBER, *self._columns}
        batch = self._collator([{name: row[name] for name in row if name not in taken} for row in rows])
        own = {name: [row[name] for row in rows] for name in self._columns if name in rows[0]}
        if own:
            batch |= {ROW: {name: _numbers(values) if self._columns[name] else values for name, values in own.items()}}
        if ROW_NUMBER in rows[0]:
            batch |= {ROW_NUMBER: torch.tensor([row[ROW_NUMBER] for row in rows])}
        if "input_ids" in rows[0] and len(batch["input_ids"]) != len(rows):  # one behind another
            batch |= {ROW_LENGTHS: [len(row["input_ids"]) for row in rows]}
        return batch


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
