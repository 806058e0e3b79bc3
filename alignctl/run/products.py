"""What stages make for later ones, rows or a model, listed in a manifest. Rows are written here. Torch-free.

A manifest has the size and the SHA-256 of each file, which are looked at when a stage begins that takes what an earlier
one made; a large file that was looked at is noted, and not read again. Which rows a stage is trained on is noted, too,
and with other rows it is no longer done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import alignctl
from alignctl.config.stages import StageConfig
from alignctl.data.formats import Row
from alignctl.data.writing import write_rows
from alignctl.errors import AlignctlError
from alignctl.run.disk import shown_bytes
from alignctl.run.files import publish_folder, read_record, write_json
from alignctl.run.fingerprint import file_digest, listed
from alignctl.run.forms import CHECKED, INPUTS, PRODUCT, ROWS
from alignctl.run.owner import take_away
from alignctl.run.paths import PRODUCT_MANIFEST, RowsPaths, RunPaths, StagePaths

_LARGE = 2**28  # bytes of a file that is not read in a moment


@dataclass(frozen=True)
class RowsManifest:
    """What a folder of rows holds, and where it comes from."""

    kind: str
    """What one row holds, see data/formats.py."""
    count: int
    columns: list[str]
    files: dict[str, dict[str, Any]]
    """Name of each: {bytes, sha256}."""
    stage: str
    method: str
    alignctl: str
    """The version that wrote it."""


def write_rows_product(paths: StagePaths, rows: Iterable[Row], kind: str, stage: StageConfig) -> RowsManifest:
    """Writes what a stage made; rows are taken one by one, and need not fit into memory. Of several processes one calls
    it.

    Raises:
        AlignctlError: There are no rows.
        ValueError: A row is not of that kind, or has other columns than the first.
    """
    staged = paths.rows.staged
    take_away(staged.root)
    staged.root.mkdir(parents=True)
    count, columns = write_rows(staged.data, rows, kind)
    if count == 0:
        raise AlignctlError("no rows were made, so there is nothing for a later stage to learn from")
    manifest = RowsManifest(kind, count, columns, listed(staged.root), stage.name, stage.method, alignctl.__version__)
    write_json(staged.manifest, asdict(manifest))
    publish_folder(staged.root, paths.rows.root)
    return manifest


def read_manifest(folder: RowsPaths) -> RowsManifest | None:
    """What a folder of rows holds; None where there is none."""
    content = read_record(folder.manifest, ROWS)
    names = [one.name for one in fields(RowsManifest)]
    return RowsManifest(**{name: content[name] for name in names}) if content else None


def check_models(stage: StageConfig, paths: StagePaths, say: Callable[[str], None]) -> None:
    """Whether the models and adapters of earlier stages that a stage takes are as they were saved.

    Args:
        say: Is told of what takes a while.

    Raises:
        AlignctlError: One is not.
    """
    if left := unread_models(stage, paths):
        size = shown_bytes(sum(file.stat().st_size for file in left))
        say(f"{stage.name}: {size} of models are read, to see whether they are as earlier stages saved them")
    for name, file, facts in _unchecked(stage, paths):
        found = file.is_file() and _as_noted(file, facts)  # before it is read: a change meanwhile is seen the next time
        if not _is_as_listed(file, facts):
            raise AlignctlError(
                f"{file} is not what stage `{name}` saved",
                f"remove {_giver(paths, name).root}, and the same command trains it again; a model of your own is "
                "given as a folder",
            )
        if facts["bytes"] >= _LARGE:
            noted = read_record(paths.checked, CHECKED) or {}
            write_json(paths.checked, noted | {str(file): found})


def unread_models(stage: StageConfig, paths: StagePaths) -> list[Path]:
    """Large files that are still to be read to know that."""
    return [file for _, file, facts in _unchecked(stage, paths) if facts["bytes"] >= _LARGE and file.is_file()]


def _unchecked(stage: StageConfig, paths: StagePaths) -> list[tuple[str, Path, Mapping[str, Any]]]:
    """Files of the models that a stage takes of which it is not noted that they are as they were saved: whose, which,
    and what the manifest says of each."""
    noted = read_record(paths.checked, CHECKED) or {}
    return [
        (name, file, facts)
        for name, file, facts in _files_taken(stage, paths)
        if not file.is_file() or noted.get(str(file)) != _as_noted(file, facts)
    ]


def _files_taken(stage: StageConfig, paths: StagePaths) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    """Files of all models and adapters that a stage takes."""
    taken = [(name, stage.takes_adapter(role)) for role, name in stage.roles_from.items()]
    if stage.start_from:
        taken.append((stage.start_from, False))
    for name, adapter in dict.fromkeys(taken):
        giver = _giver(paths, name)
        folder = giver.adapter if adapter else giver.model
        manifest = read_record(folder / PRODUCT_MANIFEST, PRODUCT) or {"files": {}}
        yield from ((name, folder / file, facts) for file, facts in manifest["files"].items())


def _as_noted(file: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted of a file whose content a manifest lists."""
    found = file.stat()
    return {"bytes": found.st_size, "sha256": facts["sha256"], "modified_ns": found.st_mtime_ns}


def take_rows(stage: StageConfig, paths: StagePaths) -> bool:
    """Notes which rows of an earlier stage a stage is trained on, before it begins. What it did with others is removed,
    so that it begins anew: whether that was so.

    Raises:
        AlignctlError: There are no such rows, or they are not as they were written.
    """
    if stage.data.rows_from is None:
        return False
    manifest = _whole(stage.data.rows_from, _giver(paths, stage.data.rows_from).rows)
    now = {"rows_from": stage.data.rows_from, "files": manifest.files}
    others = read_record(paths.inputs, INPUTS) not in (None, now)
    if others:
        begin_anew(paths)
    write_json(paths.inputs, now)
    return others


def rows_changed(paths: StagePaths) -> bool:
    """Whether the rows that a stage was trained on have been replaced by others since."""
    taken = read_record(paths.inputs, INPUTS)
    manifest = taken and read_manifest(_giver(paths, taken["rows_from"]).rows)
    return bool(manifest) and manifest.files != taken["files"]


def _giver(paths: StagePaths, stage: str) -> StagePaths:
    return RunPaths(paths.root.parent).stage(stage)


def _whole(name: str, folder: RowsPaths) -> RowsManifest:
    """What a stage made, once it is known to be as it was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise AlignctlError(f"stage `{name}` has made no rows yet: there is no {folder.manifest}")
    files = ((folder.root / file, facts) for file, facts in manifest.files.items())
    if changed := next((file for file, facts in files if not _is_as_listed(file, facts)), None):
        raise AlignctlError(
            f"{changed} is not what stage `{name}` wrote",
            f"remove {folder.root}, and the same command makes the rows again; rows of your own are given as "
            "`data.path`",
        )
    return manifest


def _is_as_listed(file: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file is as a manifest lists it, by its size and by its content."""
    return file.is_file() and file.stat().st_size == facts["bytes"] and file_digest(file) == facts["sha256"]


def begin_anew(paths: StagePaths) -> None:
    """Leaves of a stage only what is not its work: logs, scripts, the link of the job at it. The note of its rows goes
    last, so that a kill in between leaves nothing that looks as if it was made of the new ones.

    Raises:
        OSError: Something cannot be removed, a checkpoint perhaps, that the stage would continue from.
    """
    kept = {paths.logs(1).parent, paths.script, paths.array_script, paths.job_lock, paths.inputs}
    for path in paths.root.iterdir() if paths.root.is_dir() else ():
        if path not in kept:
            take_away(path, strict=True)
