"""Checkpoints that are whole or not there: staged, listed in a manifest, synced, renamed. Torch-free.

transformers writes straight into `checkpoint-N`, so a kill leaves half a checkpoint that looks like a whole one. Here
a checkpoint is written to `.staging/`, and gets its name only when every file is on disk and listed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

PREFIX = "checkpoint-"
STAGING = ".staging"
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps taken."""


def publish(staged: Path, final: Path, step: int) -> None:
    """Turns a staged checkpoint into a complete one under its final name.

    Files become readable for everyone who may read the folder: safetensors writes them for the owner only.
    """
    sizes = {}
    for file in sorted(file for file in staged.rglob("*") if file.is_file()):
        file.chmod(0o644)
        _sync(file)
        sizes[file.relative_to(staged).as_posix()] = file.stat().st_size
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"step": step, "bytes": sizes}, indent=2))
    _sync(manifest)
    _sync(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints in a folder, oldest first."""
    found = [_read(path) for path in folder.glob(f"{PREFIX}*")]
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove_old(folder: Path, keep_last: int | None, best: Path | None) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one; keeps all when `keep_last` is None or 0."""
    if keep_last:
        for checkpoint in complete_checkpoints(folder)[:-keep_last]:
            if checkpoint.path != best:
                shutil.rmtree(checkpoint.path)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in `path` if every file of its manifest is there in full."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        whole = all((path / name).stat().st_size == size for name, size in manifest["bytes"].items())
        return Checkpoint(path, manifest["step"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
