"""Checkpoints that are whole or not there: staged, listed in a manifest, synced, renamed. Torch-free.

transformers writes straight into `checkpoint-N`, so a kill leaves half a checkpoint that looks like a whole one. Here
a checkpoint is written to `.staging/checkpoint-N/`, each process notes in `.staging/checkpoint-N.parts/` what it has
brought to disk, and it gets its name only when all have. What happens to it afterwards (a disk that fails, a file
removed by hand) shows in the sizes, which are looked at every time, and in the hashes, which take as long as reading
the files and are looked at before training continues from one.

Only folders named `checkpoint-N` are ours: all others among them are let be. One that is damaged is set aside.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignctl.config.forms import misfit
from alignctl.run.files import publish_folder, read_json, write_json
from alignctl.run.fingerprint import file_digest
from alignctl.run.forms import CHECKPOINT
from alignctl.run.owner import take_away

PREFIX = "checkpoint-"
STAGING = ".staging"
DAMAGED = "damaged"
"""Folder beside checkpoints for those that were found damaged."""
MANIFEST = "MANIFEST.json"
_PARTS = ".parts"
_OURS = re.compile(rf"{PREFIX}[0-9]+")
_FOR_READERS = re.compile(
    r"README\.md|(.*/)?(tokenizer|added_tokens|special_tokens|vocab|merges|chat_template|generation_config)[^/]*"
    r"|additional_chat_templates/.*"
)
"""Files of a checkpoint that training does not read: it has its tokenizer from where the model came from."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps taken."""
    kind: dict[str, Any]
    """What wrote it, as it was given to `note_part`: {processes: 2, ...}."""
    flaws: tuple[str, ...] = ()
    """What is wrong with files that training does not read."""


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
    if not staging.is_symlink():
        for staged in ours(staging):
            publish(staged)
    take_away(staging)


def _parts(staged: Path) -> Path:
    return staged.with_name(staged.name + _PARTS)


def ours(folder: Path) -> list[Path]:
    """What has the name of a checkpoint in a folder."""
    return [path for path in folder.glob(f"{PREFIX}*") if _OURS.fullmatch(path.name)]


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints in a folder, oldest first; files count by their sizes."""
    found = [_read(path) for path in ours(folder)]
    return sorted((one for one in found if isinstance(one, Checkpoint)), key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove_old(folder: Path, keep_last: int | None, best: Path | None) -> None:
    """Removes all but the newest `keep_last` checkpoints and the best one; keeps all when `keep_last` is None or
    below 1."""
    if keep_last and keep_last > 0:
        for checkpoint in complete_checkpoints(folder)[:-keep_last]:
            if checkpoint.path != best:
                remove(checkpoint.path)


def set_aside_torn(folder: Path) -> dict[Path, str]:
    """Sets checkpoints aside that have a flaw in their sizes, and says what is wrong with each."""
    torn = {path: found for path in ours(folder) if isinstance(found := _read(path), str)}
    for path in torn:
        set_aside(path)
    return torn


def changed_files(checkpoint: Checkpoint, rank: int, processes: int) -> list[str]:
    """Files whose content is not what the manifest says though they are as long, of those that a process of so many
    looks at: what it has written itself, where they are those that wrote it. Of files that training reads the first
    one is enough."""
    files = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))["files"]
    own = [name for name, file in files.items() if file.get("rank", 0) % processes == rank]
    changed: list[str] = []
    for name in own:
        path = checkpoint.path / name
        if _size_flaw(path, name, files[name]["bytes"]) is None and file_digest(path) != files[name]["sha256"]:
            changed.append(name)
            if is_read(name):
                break
    return changed


def is_read(name: str) -> bool:
    """Whether training that continues from a checkpoint reads one of its files."""
    return _FOR_READERS.fullmatch(name) is None


def set_aside(path: Path) -> Path:
    """Moves a damaged checkpoint to where nothing looks for one; returns its place."""
    folder = path.parent / DAMAGED
    folder.mkdir(exist_ok=True)
    names = (path.name + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
    place = next(one for name in names if not os.path.lexists(one := folder / name))
    return path.rename(place)


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
    flaws = {name: flaw for name, size in sizes.items() if (flaw := _size_flaw(path / name, name, size))}
    torn = next((flaw for name, flaw in flaws.items() if is_read(name)), None)
    return torn or replace(checkpoint, flaws=tuple(flaws.values()))


def _size_flaw(path: Path, name: str, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except (OSError, ValueError):
        return f"{name} is missing"
    return None if found == size else f"{name} has {found:,} bytes, not {size:,}"
