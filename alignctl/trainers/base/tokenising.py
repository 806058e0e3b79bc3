"""Rows are turned into token ids in batches, on all cores, by one process for all others: before TRL would."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from alignctl.data.cores import write_converted
from alignctl.data.encoding import Encoder, encodes_batches, tokenizer_key
from alignctl.data.kept import kept, read_rows, write_rows
from alignctl.data.token_columns import TEXTS, PairIds, TokenColumns

_MADE_BY = ("tokenizers", "transformers", "trl")
_TRIED = 100  # rows
_AT_ONCE = 1_000  # rows
_OTHER_TEXTS = {"tools", "chat_template_kwargs"}  # columns that TRL hands to a template


class TokenisesRows:
    """Mixin before a trainer of TRL, whose `_prepare_dataset` it does.

    What of TRL is used here, and what a change there would break: the names of the columns that its collators take, and
    that it prepares rows in this method. Where a tokenizer or a row is out of the ordinary, TRL does it its own way.
    """

    count_rows: Callable[[int], None]

    @abstractmethod
    def token_columns(self, args: Any, *more: Any) -> TokenColumns | None:
        """What rows are made into, by what `_prepare_dataset` is called with; None to leave them to TRL."""

    def prepared(self, rows: Dataset, processing_class: Any, args: Any, *more: Any) -> Dataset:
        """What else becomes of rows that have their ids."""
        return rows

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, *more: Any) -> Dataset:
        columns = self.token_columns(args, *more)
        if columns and set(columns.names) <= set(dataset.column_names):
            return dataset  # it comes from here
        if columns is None or not encodes_batches(processing_class) or _OTHER_TEXTS & set(dataset.column_names):
            return super()._prepare_dataset(dataset, processing_class, args, *more)
        template = getattr(self, "chat_template", None)
        rows = tokenised(dataset, processing_class, columns, template, args.dataset_num_proc, self.count_rows)
        return self.prepared(rows, processing_class, args, *more)


class TokenisesPairs(TokenisesRows):
    """Mixin before `trl.DPOTrainer`."""

    def token_columns(self, args: Any, *more: Any) -> TokenColumns:
        return PairIds(args.max_length, args.truncation_mode)


def tokenised(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: TokenColumns,
    template: str | None,
    processes: int | None,
    count: Callable[[int], None],
) -> Dataset:
    """Rows with token ids in place of their texts; found, where they were made before.

    Args:
        template: A chat template, in place of the tokenizer's own.
        processes: That many do it; None for one a core.
        count: Is told of more rows that are done, as it goes.
    """
    texts = [name for name in rows.column_names if name in TEXTS]
    others = {name: kind for name, kind in rows.features.items() if name not in texts}

    def make(folder: Path) -> None:
        encoder = Encoder(tokenizer, columns.written(tokenizer, rows[:_TRIED], template))
        features = Features(others | dict.fromkeys(columns.names, List(Value("int32"))))
        convert = partial(_converted, encoder=encoder, tokenizer=tokenizer, columns=columns, template=template)
        write_converted(folder, rows, convert, features, processes, count)

    said = [type(columns).__name__, asdict(columns), template, [version(package) for package in _MADE_BY]]
    folder = kept(["token ids", rows._fingerprint, tokenizer_key(tokenizer), *said], make)
    return read_rows(*sorted(folder.glob("rows_*.arrow")))  # TRL keeps what it makes of them beside them


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

    return read_rows(kept(["KL_completion_ids", rows._fingerprint, together], make) / "rows.arrow")


def _converted(
    rows: dict[str, list[Any]],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    columns: TokenColumns,
    template: str | None,
) -> dict[str, list[Any]]:
    """A batch of columns with ids in place of texts, without the rows that are dropped."""
    texts = columns.written(tokenizer, rows, template)
    plain = isinstance(next(rows[name] for name in TEXTS if name in rows)[0], str)
    made = [columns.of(ids) for ids in encoder(texts, special=plain)]
    kept_rows = [i for i, ids in enumerate(made) if ids is not None]
    others = {name: [values[i] for i in kept_rows] for name, values in rows.items() if name not in TEXTS}
    return others | {name: [made[i][place] for i in kept_rows] for place, name in enumerate(columns.names)}
