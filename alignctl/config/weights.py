"""What the files of a checkpoint say about its weights, without loading them. Torch-free.

A file of safetensors begins with the length of its header, eight bytes, and the header: names, types and shapes
as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file."""

    type: str
    """As safetensors writes it: `BF16`."""
    shape: tuple[int, ...]


def saved_tensors(folder: Path) -> dict[str, SavedTensor]:
    """The weights in a folder by name; empty where there are none, or they cannot be read."""
    tensors: dict[str, SavedTensor] = {}
    try:
        if (folder / _INDEX).is_file():
            files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [_FILE]
        for name in files:
            with (folder / name).open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            tensors |= {key: SavedTensor(one["dtype"], tuple(one["shape"])) for key, one in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return {}
    return tensors


def find_broken(folder: Path, whole: bool = True) -> str | None:
    """The first file of weights in a folder that is not there as a whole, as after a download that was cut short, and
    what is wrong with it; None where all are.

    Args:
        whole: Whether all files that the index names have to be there.
    """
    index, names = folder / _INDEX, [_FILE]
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({Path(name).name for name in named})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return f"{_INDEX} is damaged"
        if whole and (missing := next((name for name in names if not (folder / name).is_file()), None)):
            return f"{missing} is missing, which {_INDEX} names"
    found = ((name, _cut_short(folder / name)) for name in names if (folder / name).is_file())
    return next((f"{name} {flaw}" for name, flaw in found if flaw), None)


def _cut_short(file: Path) -> str | None:
    """What is wrong with the size of a file of safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                return f"has {size:,} bytes, and no whole header"
            header = json.loads(opened.read(length))
        ends = [one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return f"has no header of safetensors: {type(error).__name__}"
    return None if size == wanted else f"has {size:,} bytes, and by its header {wanted:,}"


def saved_type(tensors: Mapping[str, SavedTensor]) -> str | None:
    """The type of most of the numbers, as torch calls it; None where none of them are of a type to compute with."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.type in _TYPES:
            counts[tensor.type] = counts.get(tensor.type, 0) + prod(tensor.shape)
    return _TYPES[max(counts, key=lambda kind: counts[kind])] if counts else None
