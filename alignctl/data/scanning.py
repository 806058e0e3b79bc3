"""What is asked of all rows, answered from their Arrow columns, where none becomes an object of Python. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_AT_ONCE = 10_000  # rows


def characters(rows: Dataset) -> np.ndarray:
    """Characters of all texts of each row, those in its messages included: int64 `[rows]`."""
    parts = [
        sum((_characters(column.combine_chunks()) for column in table.columns), np.zeros(len(table), np.int64))
        for table in rows.with_format("arrow").iter(_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def prompt_keys(rows: Dataset, seed: int) -> Iterator[bytes]:
    """A hash of each row's prompt, which puts prompts into an order that depends on nothing but the seed. What is no
    prompt and completion is known by its text, or by all of its messages but the last."""
    column = next(name for name in ("prompt", "text", "messages") if name in rows.column_names)
    for batch in rows.select_columns([column]).iter(_AT_ONCE):
        for value in batch[column]:
            prompt = value[:-1] if column == "messages" else value
            yield hashlib.sha256(f"{seed}|{json.dumps(prompt)}".encode()).digest()


def _characters(column: pa.Array) -> np.ndarray:
    """Characters of each value of a column: text, or what holds text; of anything else 0."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.asarray(pc.fill_null(pc.utf8_length(column), 0)).astype(np.int64)
    if pa.types.is_struct(kind):
        return sum(map(_characters, column.flatten()), np.zeros(len(column), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        until = np.concatenate([[0], np.cumsum(_characters(column.flatten()))])
        counts = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
        ends = np.cumsum(counts)
        return until[ends] - until[ends - counts]
    return np.zeros(len(column), np.int64)
