"""Writes files and folders so that a reader never sees half of one, and reads small files. Torch-free."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from alignctl.config.forms import Form, misfit
from alignctl.errors import RequestError


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one: to a temporary name, to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")  # no two of a machine are alike
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: Python's own has words for NaN and infinity, here they are null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none or it is torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_record(path: Path, form: Form) -> Any:
    """The content of a JSON file that is written whole or not at all; None where there is none.

    Raises:
        RequestError: It is damaged, which nothing of ours does.
    """
    if not path.exists():
        return None
    content = read_json(path)
    flaw = "it is no JSON" if content is None else misfit(content, form)
    if flaw:
        raise RequestError(
            f"{path} is damaged, or of another alignctl: {flaw}",
            "put it back as it was, or begin anew with another `run_dir`",
        )
    return content


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a file with one JSON value a line; a torn last line is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


def publish_folder(staged: Path, final: Path, on_disk: Collection[str] = ()) -> None:
    """Gives a folder that is written its name, once all of it is on disk; a folder that has the name is replaced.

    Files become readable for everyone who may read the folder: safetensors writes them for the owner only.

    Args:
        on_disk: Files that were seen to, by their relative names.
    """
    for path in staged.rglob("*"):
        if path.relative_to(staged).as_posix() in on_disk:
            continue
        if path.is_file():
            path.chmod(0o644)
        _sync(path)
    _sync(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
