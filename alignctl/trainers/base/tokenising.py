"""Rows are turned into token ids in batches, on all cores, by one process for all others: before TRL would. Those that
`max_length` leaves too little of are left out, and it is known of each what became of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from alignctl.data.cores import write_converted
from alignctl.data.encoding import Encoder, encodes_batches, tokenizer_key
from alignctl.data.kept import kept, read_rows, write_rows, write_some
from alignctl.data.lengths import RowLengths
from alignctl.data.token_columns import TEXTS, TOOLS, LabelledIds, PairIds, TokenColumns
from alignctl.trainers.base.columns import ROW_NUMBER

_MADE_BY = ("tokenizers", "transformers", "trl")
_TRIED = 100  # rows
_AT_ONCE = 1_000  # rows
_OTHER_TEXTS = {"chat_template_kwargs"}  # columns that TRL hands to a template
_LENGTHS = "lengths.npy"
_NEEDED = ("alignctl: least", "alignctl: whole")  # columns, until all rows are there


class Tokenised(NamedTuple):
    """Rows as token ids."""

    rows: Dataset
    """Those that are not lost."""
    lengths: RowLengths
    """Of all rows that there were."""


class TokenisesRows:
    """Mixin before a trainer of TRL, whose `_prepare_dataset` it does.

    What of TRL is used here, and what a change there would break: the names of the columns that its collators take, and
    that it prepares rows in this method. Where a tokenizer or a row is out of the ordinary, TRL does it its own way.
    """

    count_rows: Callable[[int], None]
    lengths_of: dict[str, RowLengths]
    """Of the rows that it was given, by what they are for: `train` and `eval`."""

    @classmethod
    @abstractmethod
    def token_columns(cls, args: Any, names: Collection[str], *more: Any) -> TokenColumns:
        """What rows with such columns are made into, by what `_prepare_dataset` is called with."""

    def prepared(self, rows: Dataset, processing_class: Any, args: Any, *more: Any) -> Dataset:
        """What else becomes of rows that have their ids."""
        return rows

    def by_trl(self, rows: Dataset, processing_class: Any, args: Any, *more: Any) -> Dataset:
        """Rows with their ids as TRL makes them, whole."""
        args = copy(args)
        args.max_length = None
        return super()._prepare_dataset(rows, processing_class, args, *more)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, *more: Any) -> Dataset:
        names = set(dataset.column_names)
        columns = self.token_columns(args, names, *more)
        if set(columns.names) <= names:
            return dataset  # it comes from here
        marked = isinstance(columns, LabelledIds) and columns.marked
        if marked or not encodes_batches(processing_class) or _OTHER_TEXTS & names:
            rows, lengths = within(self.by_trl(dataset, processing_class, args, *more), columns)
        else:
            template = getattr(self, "chat_template", None)
            rows, lengths = tokenised(
                dataset, processing_class, columns, template, args.dataset_num_proc, self.count_rows
            )
        if ROW_NUMBER in names:  # rows may have been shuffled before
            lengths = replace(lengths, numbers=np.asarray(dataset[ROW_NUMBER]))
        self.lengths_of[more[-1]] = lengths
        return self.prepared(rows, processing_class, args, *more)


class TokenisesPairs(TokenisesRows):
    """Mixin before `trl.DPOTrainer`."""

    @classmethod
    def token_columns(cls, args: Any, *more: Any) -> TokenColumns:
        return PairIds(args.max_length, args.truncation_mode)


def tokenised(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: TokenColumns,
    template: str | None,
    processes: int | None,
    count: Callable[[int], None],
) -> Tokenised:
    """Rows with token ids in place of their texts; found, where they were made before.

    Args:
        template: A chat template, in place of the tokenizer's own.
        processes: That many do it; None for one a core.
        count: Is told of more rows that are done, as it goes.
    """
    texts = [name for name in rows.column_names if name in TEXTS]
    others = {name: kind for name, kind in rows.features.items() if name not in (*texts, TOOLS)}

    def make(folder: Path) -> None:
        encoder = Encoder(tokenizer, columns.written(tokenizer, rows[:_TRIED], template))
        ids = dict.fromkeys(columns.names, List(Value("int32")))
        features = Features(others | ids | dict.fromkeys(_NEEDED, Value("int64")))
        convert = partial(_converted, encoder=encoder, tokenizer=tokenizer, columns=columns, template=template)
        write_converted(folder, rows, convert, features, processes, count)
        np.save(folder / _LENGTHS, _leave_out_lost(_files(folder), columns))

    said = [type(columns).__name__, asdict(columns), template, [version(package) for package in _MADE_BY]]
    folder = kept(["token ids", rows._fingerprint, tokenizer_key(tokenizer), *said], make, rows)
    lengths = RowLengths.of(columns.max_length, np.load(folder / _LENGTHS), columns.why_lost)
    return Tokenised(read_rows(*_files(folder)).remove_columns(list(_NEEDED)), lengths)


def within(rows: Dataset, columns: TokenColumns) -> Tokenised:
    """Rows that have their ids, whole, as `tokenised` leaves them."""
    needed = [
        columns.needed(one)
        for batch in rows.select_columns(list(columns.names)).iter(_AT_ONCE)
        for one in zip(*(batch[name] for name in columns.names), strict=True)
    ]
    lengths = RowLengths.of(columns.max_length, needed, columns.why_lost)
    rows = rows.select((~lengths.lost).nonzero()[0])
    if lengths.cut.any():
        rows = rows.map(_cut, fn_kwargs={"columns": columns}, desc="Cutting rows")
    return Tokenised(rows, lengths)


def _cut(row: dict[str, Any], columns: TokenColumns) -> dict[str, Any]:
    return dict(zip(columns.names, columns.cut(tuple(row[name] for name in columns.names)), strict=True))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows_*.arrow"))  # TRL keeps what it makes of them beside them


def _leave_out_lost(files: list[Path], columns: TokenColumns) -> np.ndarray:
    """Takes rows that are lost out of files; what each row needs, int64 `[rows, 2]`."""
    found = []
    for file in files:
        rows = Dataset.from_file(str(file)).data
        found.append(np.stack([rows.column(name).to_numpy() for name in _NEEDED], axis=1))
        lost = RowLengths.of(columns.max_length, found[-1], columns.why_lost).lost
        if lost.any():
            write_some(file, some := file.with_suffix(".some"), ~lost)
            some.replace(file)
    return np.concatenate(found)


def with_others_answers(rows: Dataset, together: int) -> Dataset:
    """Rows with `KL_completion_ids`: of so many rows at a time, each has the completion of the one before it, and the
    first that of the last."""

    def batches() -> Iterator[dict[str, list[Any]]]:
        for batch in rows.iter(together * max(1, _AT_ONCE // together)):
            ids = batch["completion_ids"]
            some = [ids[start : start + together] for start in range(0, len(ids), together)]
            yield batch | {"KL_completion_ids": [one for part in some for one in (part[-1], *part[:-1])]}

    def make(folder: Path) -> None:
        features = Features(rows.features | {"KL_completion_ids": rows.features["completion_ids"]})
        write_rows(folder / "rows.arrow", features, batches())

    return read_rows(kept(["KL_completion_ids", rows._fingerprint, together], make, rows) / "rows.arrow")


def _converted(
    rows: dict[str, list[Any]],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    columns: TokenColumns,
    template: str | None,
) -> dict[str, list[Any]]:
    """A batch of columns with ids in place of texts, and what each row needs; a row that is lost has no ids."""
    texts = columns.written(tokenizer, rows, template)
    plain = isinstance(next(rows[name] for name in TEXTS if name in rows)[0], str)
    made = [columns.of(ids) for ids in encoder(texts, special=plain)]
    needed = [columns.needed(one) for one in made]
    lost = RowLengths.of(columns.max_length, needed, columns.why_lost).lost
    none = ([],) * len(columns.names)
    made = [none if is_lost else columns.cut(one) for one, is_lost in zip(made, lost, strict=True)]
    others = {name: values for name, values in rows.items() if name not in (*TEXTS, TOOLS)}
    ids = {name: [one[place] for one in made] for place, name in enumerate(columns.names)}
    return others | ids | dict(zip(_NEEDED, map(list, zip(*needed, strict=True)), strict=True))
