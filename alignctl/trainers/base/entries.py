"""All pairs of a prompt as one entry of a batch, so that none of its completions is met again in another step.

Ouyang et al. 2022 (arXiv:2203.02155, section 3.5): pairs of K completions that are shuffled as if they had nothing to
do with each other let a reward model overfit in one epoch. The loss stays a mean over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from alignctl.trainers.base.columns import ROW_NUMBER
from alignctl.trainers.base.last_batch import own_rows_of_last

PROMPT_NUMBER = "alignctl: prompt number"
"""Column of the training rows, where some share a prompt: which one it is. Of a name that no data has."""
_ENTRY_ROWS = "alignctl: rows of each entry"  # in a batch

Row = dict[str, Any]


class Entries(TorchDataset):
    """Rows as a batch takes them: those of one prompt, which lie one behind another, at once."""

    def __init__(self, rows: Dataset, numbers: np.ndarray):
        """`numbers` say which prompt each row has, int64 `[rows]`."""
        self.rows = rows
        self._starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        self._ends = np.append(self._starts[1:], len(numbers))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[Row]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[list[Row]]:
        spans = [range(self._starts[index], self._ends[index]) for index in indices]
        found = iter(self.rows.__getitems__(list(chain(*spans))))
        return [[next(found) for _ in span] for span in spans]

    def summed(self, values: Sequence[int]) -> list[int]:
        """What rows have, added up for each entry."""
        return np.add.reduceat(np.asarray(values), self._starts).tolist()


class KeepsPromptsTogether:
    """Mixin before everything else of a trainer of pairs: those of one prompt stay together, in training."""

    train_dataset: Dataset
    notices: list[str]

    def __init__(self, *args: Any, train_dataset: Dataset, **kwargs: Any):
        super().__init__(*args, train_dataset=with_prompt_numbers(train_dataset), **kwargs)
        if PROMPT_NUMBER in self.train_dataset.column_names:
            rows, size = len(self.train_dataset), self.args.per_device_train_batch_size
            self.notices.append(
                f"batches: {size} prompts each, with all their pairs ({rows:,} pairs of {self.num_entries:,} prompts)"
            )

    @property
    def num_entries(self) -> int:
        """See Managed."""
        numbers = prompt_numbers(self.train_dataset)
        return len(self.train_dataset) if numbers is None else len(Entries(self.train_dataset, numbers))

    def _get_dataloader(
        self, dataset: Dataset, description: str, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        numbers = prompt_numbers(dataset) if is_training else None
        if numbers is None:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        entries = Entries(self._remove_unused_columns(dataset, description=description), numbers)
        collator = self.data_collator
        self.data_collator = _OfEntries(collator)
        try:
            return super()._get_dataloader(entries, description, *args, is_training=True, **kwargs)
        finally:
            self.data_collator = collator

    def own_of_last(self, batches: list[dict[str, Any]]) -> int | None:
        """See DividesSteps: of so many entries, their rows."""
        sizes = [batch.pop(_ENTRY_ROWS, None) for batch in batches]
        own = own_rows_of_last(self, self.num_entries)
        return own if own is None or sizes[-1] is None else sum(sizes[-1][:own])


class _OfEntries:
    """A collator of entries: of all their rows, with how many each has."""

    def __init__(self, collator: Callable[[list[Row]], dict[str, Any]]):
        self._collator = collator

    def __call__(self, entries: list[list[Row]]) -> dict[str, Any]:
        return self._collator(list(chain(*entries))) | {_ENTRY_ROWS: list(map(len, entries))}


def with_prompt_numbers(rows: Dataset) -> Dataset:
    """Rows that say which prompt they have, where some that one row of the data gave have the same."""
    if ROW_NUMBER not in rows.column_names or "prompt" not in rows.column_names:
        return rows
    of_data = np.asarray(rows.data.column(ROW_NUMBER)) if rows._indices is None else np.asarray(rows[ROW_NUMBER][:])
    follows = np.flatnonzero(of_data[1:] == of_data[:-1])
    if not len(follows):
        return rows
    begins = np.ones(len(rows), np.int64)
    prompts = rows.select_columns(["prompt"])
    for row in follows.tolist():
        one, other = prompts[row : row + 2]["prompt"]
        begins[row + 1] = one != other
    return rows.add_column(PROMPT_NUMBER, np.cumsum(begins)) if not begins.all() else rows


def prompt_numbers(rows: Dataset) -> np.ndarray | None:
    """Which prompt each row has, int64 `[rows]`; None where all have one of their own."""
    return np.asarray(rows[PROMPT_NUMBER][:], np.int64) if PROMPT_NUMBER in rows.column_names else None
