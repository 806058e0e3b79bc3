"""Writes files and folders so that a reader never sees half of one, and reads small files. Torch-free."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignctl.config.forms import Form, misfit
from alignctl.config.secrets import mask
from alignctl.errors import RequestError, first_few
from alignctl.run.owner import plain


def write_text(path: Path, text: str, make_folder: bool = True) -> None:
    """Writes a whole file or leaves the old one: to a temporary name, to disk, then renamed.

    Args:
        make_folder: Whether its folder is made where there is none.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # which nobody can have put there
    try:
        with open(temporary, "x", encoding="utf-8", opener=plain) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, make_folder: bool = True) -> None:
    write_text(path, to_json(value, indent=2) + "\n", make_folder)


def leave_json(path: Path, value: Any) -> None:
    """Writes what another process is to know of the end of one. The folder of the file is made, but not those above:
    where they were taken away, as a run directory may be under its processes, nothing is written."""
    with suppress(FileNotFoundError):
        path.parent.mkdir(exist_ok=True)
        write_json(path, value, make_folder=False)


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
    with open(path, "a", encoding="utf-8", opener=plain) as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: Python's own has words for NaN and infinity, here they are null.
    Secrets are masked."""
    value = mask(value)
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
    if not path.is_file():  # a pipe would keep us waiting
        return None
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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; lines that are none are left out."""
    return [row for _, row in _lines(path) if row is not None]


def keep_steps(path: Path, wanted: Callable[[int], bool]) -> str | None:
    """Leaves of a file of rows, each with its `step`, those of steps that are wanted. Lines that are no such row are
    set aside beside it, except a last one that was being written.

    Returns:
        What to tell people of lines that are set aside.
    """
    lines = _lines(path)
    rows = [row if row is not None and isinstance(row.get("step"), int) else None for _, row in lines]
    bad = [number for number, row in enumerate(rows, start=1) if row is None]
    if lines and rows[-1] is None and not lines[-1][0].endswith(b"\n"):
        bad.pop()
    if bad:
        aside = path.with_name(f"{path.name}.damaged")
        with open(aside, "ab", opener=plain) as file:
            file.writelines(lines[number - 1][0].rstrip(b"\n") + b"\n" for number in bad)
    write_json_lines(path, [row for row in rows if row is not None and wanted(row["step"])])
    if not bad:
        return None
    listed = first_few([str(number) for number in bad])
    return f"{path.name}: line{'s' * (len(bad) > 1)} {listed} cannot be read, and set aside in {aside}"


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file with their ends, and the row of each; None of one that has none."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    return [(line, _row(line)) for line in lines]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


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
    if final.is_symlink():
        final.unlink()
    elif final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
