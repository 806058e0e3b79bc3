"""Names of sources of rows: files, Hub ids, built-in worlds. Torch-free; raw.py reads them."""

from __future__ import annotations

import hashlib
import re
from itertools import islice
from pathlib import Path

from alignctl.data.files import FILE_SUFFIXES, LIGHT_SUFFIXES, Row, read_file, suffix

BUILTIN_SOURCES = ("builtin:quickstart",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PEEK_ROWS = 20


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `owner/name` and cannot be meant as a path on this machine."""
    return (
        _HUB_ID.fullmatch(path) is not None
        and suffix(path) not in FILE_SUFFIXES
        and not Path(path).exists()
        and not Path(path).parent.exists()
    )


def digest(file: Path) -> str:
    """SHA-256 of what a file holds."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def peek_rows(file: Path) -> list[Row]:
    """The first rows of a file; none where that takes a library.

    Raises:
        ValueError: The file has no rows or is not what its name says.
    """
    if suffix(file) not in LIGHT_SUFFIXES or file.suffix == ".zst":
        return []
    rows = list(islice(read_file(file), _PEEK_ROWS))
    if not rows:
        raise ValueError("the file has no rows")
    return rows
