"""Names of sources of rows: files, Hub ids, built-in worlds. Torch-free; reading.py does the reading."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
BUILTIN_SOURCES = ("builtin:quickstart",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PEEK_BYTES = 64 * 2**20


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `owner/name` and cannot be meant as a path on this machine."""
    return (
        _HUB_ID.fullmatch(path) is not None
        and Path(path).suffix not in FILE_SUFFIXES
        and not Path(path).exists()
        and not Path(path).parent.exists()
    )


def is_local(path: str | None) -> bool:
    """Whether nothing has to be downloaded for `path`."""
    return path is None or not is_hub_id(path)


def peek_row(file: Path) -> dict[str, Any] | None:
    """Reads the first row of a .jsonl, .csv or small .json file; None where that takes a library or too long.

    Raises:
        ValueError: The file has no rows or is not what its name says.
    """
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            row = next(csv.DictReader(lines), None)
        if row is None:
            raise ValueError("the file has no rows")
        return row
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            text = next((line for line in lines if line.strip()), None)
    elif file.suffix == ".json" and file.stat().st_size < _PEEK_BYTES:
        text = file.read_text(encoding="utf-8")
    else:
        return None
    if not text or not text.strip():
        raise ValueError("the file has no rows")
    try:
        row = json.loads(text)
    except ValueError as error:
        if file.suffix == ".json" and text.lstrip().startswith("{"):
            return _first_line(text)
        raise ValueError(f"line 1 is not JSON: {error}") from error
    if isinstance(row, list):
        if not row:
            raise ValueError("the file has no rows")
        row = row[0]
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with named columns, got {type(row).__name__}")
    return row


def first_bad_line(file: Path) -> str | None:
    """Names the first line of a .jsonl file that is not a JSON object; None when all are."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"line {number} is not JSON: {error}"
            if not isinstance(row, dict):
                return f"line {number} is not an object with named columns"
    return None


def _first_line(text: str) -> dict[str, Any]:
    """The first row of a .json file that holds one object a line."""
    try:
        row = json.loads(text.lstrip().splitlines()[0])
    except ValueError as error:
        raise ValueError(f"the file is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("a row must be an object with named columns")
    return row
