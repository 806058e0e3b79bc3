"""Where rows stand: the file and the line of each, by its number. Torch-free; the readers know them (files.py)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a row begins."""

    file: str
    line: int | None
    """Counted from 1; None in a file without lines."""


@dataclass(frozen=True)
class Places:
    """The places of all rows of a source, read or not, a few bytes each."""

    files: Sequence[str]
    where: np.ndarray
    """int64 `[rows, 2]`: which of the files, and the line; -1 where there is none."""

    def of(self, number: int) -> Place | None:
        """The place of a row, whose number is counted from 1; None where it stands in no file."""
        file, line = self.where[number - 1].tolist() if number <= len(self.where) else (-1, -1)
        return None if file < 0 else Place(self.files[file], line if line > 0 else None)

    def shown(self, number: int) -> str:
        """A row for people: its number, and its file and line where these are others."""
        place, said = self.of(number), f"{number:,}"
        if place is None or place.line in (None, number) and len(self.files) == 1:
            return said
        where = [place.file] if len(self.files) > 1 else []
        where += [f"line {place.line:,}"] if place.line else []
        return f"{said} ({', '.join(where)})"

    def told(self, number: int) -> dict[str, Any]:
        """A row for the record."""
        place = self.of(number)
        return {"row": number} | (place._asdict() if place else {})


NOWHERE = Places((), np.zeros((0, 2), np.int64))
"""Of rows that stand in no file."""


@dataclass
class Placing:
    """Writes down places as rows are read."""

    files: list[str] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)
    _where: array = field(default_factory=lambda: array("q"))

    def add(self, place: Place | None) -> None:
        """The place of the next row."""
        if place is None:
            self._where.extend((-1, -1))
            return
        if (file := self._known.get(place.file)) is None:
            file = self._known[place.file] = len(self.files)
            self.files.append(place.file)
        self._where.extend((file, place.line or -1))

    def write(self, file: Path) -> None:
        np.save(file, np.asarray(self._where, np.int64).reshape(-1, 2))


def read_places(file: Path, files: Sequence[str]) -> Places:
    """Places as they were written, mapped into memory."""
    return Places(files, np.load(file, mmap_mode="r"))
