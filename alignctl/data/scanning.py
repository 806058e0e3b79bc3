"""What is asked of all rows, answered from their Arrow columns, where none becomes an object of Python. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_AT_ONCE = 10_000  # rows


def characters(rows: Dataset) -> np.ndarray:
    """Characters of all texts of each row, those in its messages included: int64 `[rows]`."""
    return _summed(rows, _characters)


def lengths(rows: Dataset) -> np.ndarray:
    """Length of all lists of each row: int64 `[rows]`."""
    return _summed(rows, _counts)


def contents(rows: Dataset, column: str) -> Iterator[bytes]:
    """All that lists of numbers hold, with their lengths, to make a hash of."""
    for table in rows.select_columns([column]).with_format("arrow").iter(_AT_ONCE):
        lists = table[column].combine_chunks()
        yield _counts(lists).tobytes()
        yield np.asarray(lists.flatten()).astype(np.int64).tobytes()


def prompt_keys(rows: Dataset, seed: int) -> Iterator[bytes]:
    """A hash of each row's prompt, which puts prompts into an order that depends on nothing but the seed."""
    for prompt in _prompts(rows):
        yield hashlib.sha256(f"{seed}|{json.dumps(prompt)}".encode()).digest()


def plain_prompts(rows: Dataset) -> Iterator[bytes]:
    """A hash of each row's prompt, the same where white space, capital letters and roles are all that differs."""
    for prompt in _prompts(rows):
        if isinstance(prompt, str):
            plain = "".join(prompt.lower().split())
        else:
            plain = "\n".join("".join((message["content"] or "").lower().split()) for message in prompt)
        yield hashlib.sha256(plain.encode()).digest()


def row_tokens(rows: Dataset, columns: Sequence[str], count: Callable[[list[str]], list[int]]) -> np.ndarray:
    """Tokens of all texts of each row, int64 `[rows]`: without those of a template, and before anything is cut.

    Args:
        columns: Those of texts.
        count: Tokens of each of many texts.
    """
    sums = [np.zeros(0, np.int64)]
    for batch in rows.select_columns([name for name in columns if name in rows.column_names]).iter(_AT_ONCE):
        each = [
            (number, text)
            for values in batch.values()
            for number, value in enumerate(values)
            for text in ([value] if isinstance(value, str) else [message["content"] or "" for message in value])
        ]
        own = np.zeros(len(next(iter(batch.values()))), np.int64)
        np.add.at(own, [number for number, _ in each], count([text for _, text in each]))
        sums.append(own)
    return np.concatenate(sums)


def _prompts(rows: Dataset) -> Iterator[str | list[dict[str, str]]]:
    """What is no prompt and completion is known by its text, or by all of its messages but the last."""
    column = next(name for name in ("prompt", "text", "messages") if name in rows.column_names)
    for batch in rows.select_columns([column]).iter(_AT_ONCE):
        for value in batch[column]:
            yield value[:-1] if column == "messages" else value


def _summed(rows: Dataset, count: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    parts = [np.zeros(0, np.int64)]
    for table in rows.with_format("arrow").iter(_AT_ONCE):
        parts.append(sum((count(column.combine_chunks()) for column in table.columns), np.zeros(len(table), np.int64)))
    return np.concatenate(parts)


def _characters(column: pa.Array) -> np.ndarray:
    """Characters of each value of a column: text, or what holds text; of anything else 0."""
    if isinstance(column, pa.ExtensionArray):  # JSON
        column = column.storage
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.asarray(pc.fill_null(pc.utf8_length(column), 0)).astype(np.int64)
    if pa.types.is_struct(kind):
        return sum(map(_characters, column.flatten()), np.zeros(len(column), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        until = np.concatenate([[0], np.cumsum(_characters(column.flatten()))])
        counts = _counts(column)
        ends = np.cumsum(counts)
        return until[ends] - until[ends - counts]
    return np.zeros(len(column), np.int64)


def _counts(column: pa.Array) -> np.ndarray:
    """Length of each value of a column of lists."""
    return np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
