"""Checkpoints that are whole or not there: staged, listed in a manifest, synced, renamed. Torch-free.

transformers writes straight into `checkpoint-N`, so a kill leaves half a checkpoint that looks like a whole one. Here
a checkpoint is written to `.staging/`, and gets its name only when every file is on disk and listed. What happens to it
afterwards (a disk that fails, a file removed by hand) shows in the sizes, which are looked at every time, and in the
hashes, which take as long as reading the files and are looked at before training continues from one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.run.files import publish_folder
from alignctl.run.fingerprint import file_digest, listed

PREFIX = "checkpoint-"
STAGING = ".staging"
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps taken."""
    kind: dict[str, Any]
    """What wrote it, as it was given to `publish`: {processes: 2, ...}."""


def publish(staged: Path, final: Path, step: int, kind: Mapping[str, Any]) -> None:
    """Turns a staged checkpoint into a complete one under its final name.

    Args:
        kind: What one has to know to continue from it: how many processes wrote it, and how they shared the state.
    """
    content = {"step": step, "kind": dict(kind), "files": listed(staged)}
    (staged / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    publish_folder(staged, final)


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints in a folder, oldest first; files count by their sizes."""
    found = [_read(path) for path in folder.glob(f"{PREFIX}*")]
    return sorted((one for one in found if isinstance(one, Checkpoint)), key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove_old(folder: Path, keep_last: int | None, best: Path | None) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one; keeps all when `keep_last` is None or 0."""
    if keep_last:
        for checkpoint in complete_checkpoints(folder)[:-keep_last]:
            if checkpoint.path != best:
                _remove(checkpoint.path)


def remove_torn(folder: Path) -> dict[Path, str]:
    """Removes checkpoints that cannot be continued from, and says what is wrong with each.

    Those are the ones with a flaw in their sizes, and the newest ones whose files have changed since, until there is
    one to continue from: its files are hashed, those of older ones are not.
    """
    torn = {path: found for path in folder.glob(f"{PREFIX}*") if isinstance(found := _read(path), str)}
    for checkpoint in reversed(complete_checkpoints(folder)):
        changed = _changed_file(checkpoint.path)
        if changed is None:
            break
        torn[checkpoint.path] = f"the content of {changed} has changed since it was written"
    for path in torn:
        _remove(path)
    return torn


def _remove(path: Path) -> None:
    """Takes a checkpoint's name away first, so that a kill in between leaves none that looks torn."""
    doomed = path.parent / STAGING / path.name
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def _read(path: Path) -> Checkpoint | str:
    """The checkpoint in `path`, or what is wrong with it."""
    if path.is_symlink():
        return "it is a link to another folder"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
        checkpoint = Checkpoint(path, manifest["step"], manifest["kind"])
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, not {size:,}"
    return checkpoint


def _changed_file(path: Path) -> str | None:
    """The first file whose content is not what the manifest says."""
    files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    return next((name for name, file in files.items() if file_digest(path / name) != file["sha256"]), None)
