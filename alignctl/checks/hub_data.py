"""Checks of what `data` says of data sets on the Hub: it has to be said of one. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.checks.mixtures import entries_of
from alignctl.config.schema import MISSING
from alignctl.data.settings import DataSettings
from alignctl.data.sources import is_hub_id, shown
from alignctl.errors import Problem

_OF_THE_HUB = {"name": DataSettings.name, "revision": DataSettings.revision, "split": DataSettings.split}
"""Keys that files, addresses and built-in worlds have no use for, and what they are if nothing is said."""


def check_hub_data(data: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Whether a data set on the Hub is read where its configuration, revision or split is given.

    Args:
        where: The section of these rows.
    """
    entries = entries_of(data)
    for number, entry in enumerate(entries):
        for key in _OF_THE_HUB:
            yield from _of_one(entry, key, f"{where}.mix[{number}]", [entry.get("path")])
    if data.get("from") is not None:
        return  # what it excludes is another check's
    sets = data.get("eval")
    held = [data.get("eval_path"), *(sets.values() if isinstance(sets, Mapping) else ())]
    for key in _OF_THE_HUB:
        trained_on = [entry.get("path") for entry in entries if key not in entry] if entries else [data.get("path")]
        yield from _of_one(data, key, where, trained_on if key == "split" else trained_on + held)


def _of_one(said: Mapping[str, Any], key: str, where: str, paths: list[Any]) -> Iterator[Problem]:
    value, usual = said.get(key), _OF_THE_HUB[key]
    given = [path for path in paths if path is not None]
    if value in (None, usual) or not given or any(map(_may_be_on_the_hub, given)):
        return
    path = given[0]
    hint = f"set `{where}.{key}={'null' if usual is None else usual}`"
    if key == "split":
        part = Path(path, str(value)).expanduser() if isinstance(path, str) else None
        there = part is not None and part.is_dir()
        hint = f"name the split itself: `{where}.path={part}`; and {hint}" if there else f"name its file, and {hint}"
    yield Problem(f"`{where}.{key}={value}` would have no effect: {shown(path)} is no data set on the Hub", hint)


def _may_be_on_the_hub(path: Any) -> bool:
    """What is still to be given, or of no type that a path has, is reported by another check."""
    is_list = isinstance(path, list) and all(isinstance(one, str) for one in path)
    return not is_list and (not isinstance(path, str) or path == MISSING or is_hub_id(path))
