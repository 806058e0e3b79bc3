"""Writes rows that a stage makes, as lines that reading.py takes. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from alignctl.data.formats import FORMATS, Row


def write_rows(file: Path, rows: Iterable[Row], kind: str) -> tuple[int, list[str]]:
    """Writes rows of a kind, one a line, as they come. Returns how many there were, and their columns.

    Raises:
        ValueError: A row is not of that kind, or has other columns than the first. What was written stays.
    """
    formats = [row_format for row_format in FORMATS.values() if row_format.kind == kind]
    count, columns = 0, []
    with file.open("w", encoding="utf-8") as lines:
        for count, row in enumerate(rows, start=1):
            columns = columns or list(row)
            if not any(row_format.fits(row) for row_format in formats):
                raise ValueError(f"row {count} is no {kind}: it has the columns {', '.join(row)}")
            if set(row) != set(columns):
                raise ValueError(f"row {count} has the columns {', '.join(row)}, the first has {', '.join(columns)}")
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count, columns
