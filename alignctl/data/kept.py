"""What one process makes of rows and the others take: folders in the cache, named by all that went into them.

Torch-free. Runs that are started again, the points of a sweep and the processes of a run share them; machines that
have no file system in common have one each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

import alignctl
from alignctl.cache import LOCK, alone, note_source, note_use, private_dir

_MADE_BY = ("datasets", "pyarrow")


def kept(made_of: Sequence[Any], make: Callable[[Path], None], source: str | Dataset) -> Path:
    """The folder of what is made of something: found, or made now, while others who want the same wait.

    They wait until whoever makes it ends, and look again. A folder has its name only once it is whole.

    Args:
        made_of: All that it depends on beside the code of this package, as JSON takes it.
        make: Fills an empty folder.
        source: The file, Hub id or rows that it is made of, for people who look into the cache.
    """
    content = json.dumps([_code(), [version(package) for package in _MADE_BY], *made_of], sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = private_dir("rows") / name
    if not folder.exists():
        with alone(folder.with_suffix(LOCK)):
            if not folder.exists():
                _make(folder, make, source if isinstance(source, str) else _origin(source))
    note_use(folder)
    return folder


def write_rows(file: Path, features: Features, batches: Iterable[dict[str, list[Any]]]) -> None:
    """Writes batches of columns as an Arrow file, the features in it."""
    with ArrowWriter(features=features, path=str(file)) as writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.finalize()


def write_some(file: Path, chosen_file: Path, chosen: np.ndarray) -> None:
    """Writes the chosen rows of a file, bool `[rows]`, as one of their own."""
    rows, first = Dataset.from_file(str(file)), 0
    with ArrowWriter(features=rows.features, path=str(chosen_file)) as writer:
        for batch in rows.data.to_batches():
            writer.write_table(pa.Table.from_batches([batch.filter(pa.array(chosen[first : first + len(batch)]))]))
            first += len(batch)
        writer.finalize()


def read_rows(*files: Path) -> Dataset:
    """The rows of such files, mapped into memory. They are known by their names: a folder's says all."""
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    return rows.select(range(len(rows)), new_fingerprint=f"{files[0].parent.name}{files[0].stem}")


def _origin(rows: Dataset) -> str:
    """The folder that rows are mapped from; nothing of rows that are in memory."""
    return next((Path(file["filename"]).parent.name for file in rows.cache_files), "")


def _make(folder: Path, make: Callable[[Path], None], source: str) -> None:
    ours = f".{folder.name}.{socket.gethostname()}."
    for left in folder.parent.glob(f"{ours}*"):  # by one that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    staged = folder.with_name(f"{ours}{os.getpid()}")
    staged.mkdir()
    try:
        make(staged)
        note_source(staged, source)
        try:
            staged.rename(folder)
        except OSError:
            if not folder.exists():  # else another machine was faster, where locks are not shared
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@cache
def _code() -> str:
    """A hash of the code that makes rows, so that none is taken that another version would make otherwise."""
    digest = hashlib.sha256(alignctl.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
