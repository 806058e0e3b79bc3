"""The rows of a stage as its tokenizer can write them, and whether they do. Used by run.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignctl.config.schema import ModelSettings
from alignctl.config.stages import StageConfig
from alignctl.data.encoding import encodes_batches, tokenizer_key
from alignctl.data.joining import form_of
from alignctl.data.kept import kept
from alignctl.data.messages import is_messages
from alignctl.data.reading import describe_skipped
from alignctl.data.recast import as_plain_text
from alignctl.data.rendering import Reader, Said, check_has_end, check_rows
from alignctl.data.rows import Rows
from alignctl.data.scanning import row_tokens
from alignctl.data.token_columns import TEXTS
from alignctl.errors import RequestError
from alignctl.models.loading import load_own_tokenizer
from alignctl.monitor.callbacks import ProgressFile
from alignctl.run.files import read_json, write_json


def texts_of(dataset: Dataset) -> Iterator[str]:
    """All text of the rows, to train a tokenizer on."""
    for row in dataset:
        for value in row.values():
            if isinstance(value, str):
                yield value
            elif is_messages(value):
                yield from (message["content"] for message in value)


def tokens_of(source: str, settings: ModelSettings, rows: Dataset) -> np.ndarray:
    """Tokens of all texts of each row, int64 `[rows]`, by the tokenizer of a folder or Hub id."""
    tokenizer = load_own_tokenizer(source, settings)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def make(folder: Path) -> None:
        np.save(folder / "tokens.npy", row_tokens(rows, TEXTS, count))

    if not encodes_batches(tokenizer):  # there is no telling whether two of them are the same
        return row_tokens(rows, TEXTS, count)
    return np.load(kept(["tokens of rows", rows._fingerprint, tokenizer_key(tokenizer)], make, rows) / "tokens.npy")


def as_written(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, start: str | None, stage: StageConfig, progress: ProgressFile
) -> Rows:
    """Rows as the tokenizer can write them; says what is odd about how it does, and which it cannot write.

    Raises:
        RequestError: It can write none of them, or not all and `on_bad_row` is fail, or loses what is to be learnt.
    """
    check_has_end(tokenizer)
    if tokenizer.chat_template is None:
        rows = as_plain_text(rows, start or "the stage")
    said = _checked(Reader(tokenizer, bool(stage.trainer.get("assistant_only_loss"))), rows, progress)
    for notice in said.notices:
        progress.notice(notice)
    if not said.left_out:
        return rows
    refused = {rows.numbers[position]: reason for position, reason in reversed(said.left_out.items())}
    position, reason = next(iter(said.left_out.items()))
    row = rows.places.shown(rows.numbers[position])
    example = f"{len(said.left_out):,} of {len(rows.dataset):,} rows cannot be written: row {row}: {reason}"
    if stage.data.on_bad_row == "fail" or len(said.left_out) == len(rows.dataset):
        raise RequestError(
            f"{rows.ledger.source}: {example}", "give another template with `model.chat_template=...`, or other rows"
        )
    progress.notice(f"{example}; they are left out")
    left = rows.select([i for i in range(len(rows.dataset)) if i not in said.left_out])
    there, ledger = set(left.numbers), left.ledger
    skipped = ledger.skipped | {number: reason for number, reason in refused.items() if number not in there}
    partly = ledger.partly | {number: reason for number, reason in refused.items() if number in there}
    of_both = {"skipped": dict(sorted(skipped.items())), "partly": dict(sorted(partly.items()))}
    return replace(left, ledger=replace(ledger, kept=len(there), **of_both))


def _checked(reader: Reader, rows: Rows, progress: ProgressFile) -> Said:
    """What `check_rows` says of all rows: one process asks it, and the others take its word."""

    def check() -> Said:
        return check_rows(reader, _counted(rows.dataset, partial(progress.count, "rows")), rows.numbers, source)

    def make(folder: Path) -> None:
        write_json(folder / "said.json", check()._asdict())

    source = rows.ledger.source
    if not encodes_batches(reader.tokenizer):  # there is no telling whether two of them are the same
        return check()
    told = [source, rows.dataset._fingerprint, tokenizer_key(reader.tokenizer), reader.assistant_only]
    said = read_json(kept(["checked", *told], make, rows.dataset) / "said.json")
    return Said({int(position): reason for position, reason in said["left_out"].items()}, said["notices"])


def _counted(rows: Dataset, count: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Rows one by one, which are counted as they are taken."""
    for row in rows:
        yield row
        count(1)


def check_skipped(rows: Rows, stage: StageConfig) -> None:
    """
    Raises:
        RequestError: Too many rows of a source cannot be used.
    """
    ledger, most = rows.ledger, stage.data.max_skipped
    if len(ledger.skipped) > max(1, most * ledger.read):
        share = math.ceil(100 * len(ledger.skipped) / ledger.read) / 100
        raise RequestError(
            f"{ledger.source}: {describe_skipped(rows)}, and `data.max_skipped={most:g}` is the most allowed",
            f"mend or remove them; `data.max_skipped={share:g}` accepts it",
        )


def check_form(rows: Rows, held_rows: Rows | None, stage: StageConfig) -> None:
    """Whether rows have the form that settings are about, and held-out rows that of the others: what counts in the loss
    depends on it.

    Raises:
        RequestError: They have not.
    """
    if stage.trainer.get("completion_only_loss") and "completion" not in rows.dataset.column_names:
        raise RequestError(
            f"`{stage.name}.completion_only_loss=true` would have no effect: the rows of {rows.ledger.source} are "
            f"`{rows.ledger.format}`, without a column `completion`",
            f"for conversations: `{stage.name}.assistant_only_loss=true`",
        )
    if held_rows is None or held_rows.format.kind != rows.format.kind:
        return
    form, held_form = map(form_of, (rows, held_rows))
    if form != held_form:
        raise RequestError(
            f"the held-out rows of {held_rows.ledger.source} have another form ({', '.join(sorted(held_form))}) than "
            f"the training rows ({', '.join(sorted(form))}): losses of other tokens would be compared",
            "give held-out rows of the same form, or hold out some of the training rows",
        )
