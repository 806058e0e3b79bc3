"""Checkpoints that are whole or not there: staged, listed in a manifest, synced, renamed. Torch-free.

transformers writes straight into `checkpoint-N`, so a kill leaves half a checkpoint that looks like a whole one. Here
a checkpoint is written to `.staging/checkpoint-N/`, each process notes in `.staging/checkpoint-N.parts/` what it has
brought to disk, and it gets its name only when all have. What happens to it afterwards (a disk that fails, a file
removed by hand) shows in the sizes, which are looked at every time, and in the hashes, which take as long as reading
the files and are looked at before training continues from one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.config.forms import misfit
from alignctl.run.files import publish_folder, read_json, write_json
from alignctl.run.fingerprint import file_digest
from alignctl.run.forms import CHECKPOINT

PREFIX = "checkpoint-"
STAGING = ".staging"
MANIFEST = "MANIFEST.json"
_PARTS = ".parts"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps taken."""
    kind: dict[str, Any]
    """What wrote it, as it was given to `note_part`: {processes: 2, ...}."""


def note_part(staged: Path, rank: int, step: int, kind: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Notes the files of a staged checkpoint that one process has written and brought to disk; each calls it once.

    Args:
        kind: What one has to know to continue from it: how many processes wrote it, and how they shared the state.
        files: Size and SHA-256 of each, by relative name.
    """
    write_json(_parts(staged) / f"{rank}.json", {"step": step, "kind": dict(kind), "files": dict(files)})


def publish(staged: Path) -> Path | None:
    """Turns a staged checkpoint into a complete one under its final name; None where a process has not noted its part.

    No file is read but the notes: who wrote one has hashed it.
    """
    final, parts = staged.parent.parent / staged.name, _parts(staged)
    noted = [read_json(parts / "0.json")]
    if noted[0] is None or not staged.is_dir():
        return None
    noted += [read_json(parts / f"{rank}.json") for rank in range(1, noted[0]["kind"]["processes"])]
    if None in noted:
        return None
    files = {name: file | {"rank": rank} for rank, part in enumerate(noted) for name, file in part["files"].items()}
    content = {"step": noted[0]["step"], "kind": noted[0]["kind"], "files": files}
    (staged / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    publish_folder(staged, final, on_disk=files.keys())
    shutil.rmtree(parts)
    return final


def finish_staged(folder: Path) -> None:
    """Makes complete what a run that was killed had staged, if all of it is there; removes it if not."""
    staging = folder / STAGING
    for staged in staging.glob(f"{PREFIX}*"):
        if staged.suffix != _PARTS:
            publish(staged)
    shutil.rmtree(staging, ignore_errors=True)


def _parts(staged: Path) -> Path:
    return staged.with_name(staged.name + _PARTS)


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
                remove(checkpoint.path)


def remove_torn(folder: Path) -> dict[Path, str]:
    """Removes checkpoints with a flaw in their sizes, and says what is wrong with each."""
    torn = {path: found for path in folder.glob(f"{PREFIX}*") if isinstance(found := _read(path), str)}
    for path in torn:
        remove(path)
    return torn


def changed_file(checkpoint: Checkpoint, rank: int, processes: int) -> str | None:
    """The first file whose content is not what the manifest says, of those that a process of so many looks at: what it
    has written itself, where they are those that wrote it."""
    files = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))["files"]
    own = (name for name, file in files.items() if file.get("rank", 0) % processes == rank)
    return next((name for name in own if file_digest(checkpoint.path / name) != files[name]["sha256"]), None)


def remove(path: Path) -> None:
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
        if misfit(manifest, CHECKPOINT):
            return f"its {MANIFEST} is damaged"
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
        checkpoint = Checkpoint(path, manifest["step"], manifest["kind"])
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}"
    except (ValueError, RecursionError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except (OSError, ValueError):
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, not {size:,}"
    return checkpoint
