"""Names of sources of rows: files, Hub ids, built-in worlds. Torch-free; reading.py does the reading."""

from __future__ import annotations

import csv
import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
BUILTIN_SOURCES = ("builtin:quickstart",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PEEK_BYTES = 64 * 2**20
_PEEK_ROWS = 20


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `owner/name` and cannot be meant as a path on this machine."""
    return (
        _HUB_ID.fullmatch(path) is not None
        and Path(path).suffix not in FILE_SUFFIXES
        and not Path(path).exists()
        and not Path(path).parent.exists()
    )


def peek_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the first rows of a .jsonl, .csv or small .json file; none where that takes a library or too long.

    Raises:
        ValueError: The file has no rows or is not what its name says.
    """
    try:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # a transcript is longer than the limit of 128 KiB
            with file.open(newline="", encoding="utf-8") as lines:
                rows: Any = list(islice(csv.DictReader(lines), _PEEK_ROWS))
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                texts = islice((line for line in lines if line.strip()), _PEEK_ROWS)
                rows = [_parsed(text, f"line {number}") for number, text in enumerate(texts, start=1)]
        elif file.suffix == ".json" and file.stat().st_size < _PEEK_BYTES:
            rows = _json_rows(file.read_text(encoding="utf-8"))
        else:
            return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not rows:
        raise ValueError("the file has no rows")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row must be an object with named columns")
    return rows


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


def _json_rows(text: str) -> list[Any]:
    """The first rows of a .json file: a list of objects, one object, or one object a line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and text.lstrip().startswith("{"):
        try:
            return [json.loads(line) for line in lines[:_PEEK_ROWS]]
        except ValueError:
            pass  # one object over several lines
    value = _parsed(text, "the file") if lines else []
    return value[:_PEEK_ROWS] if isinstance(value, list) else [value]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
