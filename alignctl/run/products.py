"""What stages make for later ones, rows or a model, listed in a manifest. Rows are written here. Torch-free.

A manifest has the size and the SHA-256 of each file, which are looked at when a stage begins that takes what an earlier
one made. Which rows a stage is trained on is noted beside it, and with other rows it is no longer done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import alignctl
from alignctl.config.stages import StageConfig
from alignctl.data.formats import Row
from alignctl.data.writing import write_rows
from alignctl.errors import AlignctlError
from alignctl.run.files import publish_folder, read_record, write_json
from alignctl.run.fingerprint import file_digest, listed
from alignctl.run.forms import INPUTS, PRODUCT, ROWS
from alignctl.run.owner import take_away
from alignctl.run.paths import PRODUCT_MANIFEST, RowsPaths, RunPaths, StagePaths


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


def check_models(stage: StageConfig, paths: StagePaths) -> None:
    """Whether the models and adapters of earlier stages that a stage takes are as they were saved.

    Raises:
        AlignctlError: One is not.
    """
    taken = [(name, stage.takes_adapter(role)) for role, name in stage.roles_from.items()]
    if stage.start_from:
        taken.append((stage.start_from, False))
    for name, adapter in taken:
        giver = _giver(paths, name)
        folder = giver.adapter if adapter else giver.model
        manifest = read_record(folder / PRODUCT_MANIFEST, PRODUCT) or {"files": {}}
        if changed := _changed(folder, manifest["files"]):
            raise AlignctlError(
                f"{changed} is not what stage `{name}` saved",
                f"remove {folder.parent}, and the same command trains it again; a model of your own is given as a "
                "folder",
            )


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
    if changed := _changed(folder.root, manifest.files):
        raise AlignctlError(
            f"{changed} is not what stage `{name}` wrote",
            f"remove {folder.root}, and the same command makes the rows again; rows of your own are given as "
            "`data.path`",
        )
    return manifest


def _changed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """The first file that is not as a manifest lists it, by its size, or by its content."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return path
        if file_digest(path) != facts["sha256"]:
            return path
    return None


def begin_anew(paths: StagePaths) -> None:
    """Leaves of a stage only what is not its work: logs and scripts. The note of its rows goes last, so that a kill in
    between leaves nothing that looks as if it was made of the new ones.

    Raises:
        OSError: Something cannot be removed, a checkpoint perhaps, that the stage would continue from.
    """
    kept = {paths.logs(1).parent, paths.script, paths.array_script, paths.inputs}
    for path in paths.root.iterdir() if paths.root.is_dir() else ():
        if path not in kept:
            take_away(path, strict=True)
