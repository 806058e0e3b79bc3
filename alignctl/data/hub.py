"""Files of text (.jsonl, .csv and so on) of a data set on the Hub, read as files here are: the library `datasets` would
guess types, and take a text that looks like a date for one. Torch-free.

Which files belong to a configuration and a split, `datasets` says.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datasets import ClassLabel, DatasetBuilder, Features, ReadInstruction, load_dataset_builder
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from alignctl.data.files import LIGHT_SUFFIXES, Row, read_placed, suffix
from alignctl.data.places import Place

_OF_ANY = ("name", "version", "data_dir", "data_files", "description")
"""Fields of a builder's configuration that say nothing about how a file is read."""


def hub_files(path: str, name: str | None, split: str, revision: str | None) -> dict[str, list[Path]] | None:
    """The files of each part of a split, which are on this machine then.

    Args:
        name: Configuration.
        split: As `datasets` takes it: `train[:5%]`, `train+test`.

    Returns:
        None where they are no files of text, or are to be read in some way of their own.
    """
    wanted = dict.fromkeys(one.splitname for one in ReadInstruction.from_spec(split)._relative_instructions)
    if constants.HF_HUB_OFFLINE:
        try:
            folder = Path(snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        names = _names(load_dataset_builder(str(folder), name=name), folder, [*wanted])
        return names and {part: [folder / one for one in files] for part, files in names.items()}
    described = HfApi().dataset_info(path, revision=revision)
    there = {sibling.rfilename for sibling in described.siblings}
    with tempfile.TemporaryDirectory() as place:
        # Names say which files belong together, so that none but these is fetched.
        folder = Path(place).resolve()
        for one in there:
            (folder / one).parent.mkdir(parents=True, exist_ok=True)
            (folder / one).touch()

        def fetched(file: str) -> Path:
            return Path(hf_hub_download(path, file, repo_type="dataset", revision=revision))

        if "README.md" in there:
            (folder / "README.md").write_bytes(fetched("README.md").read_bytes())
        names = _names(load_dataset_builder(str(folder), name=name), folder, [*wanted])
    return names and {part: [fetched(one) for one in files] for part, files in names.items()}


def rows_of(parts: dict[str, list[Path]], split: str) -> Iterator[tuple[Place, Row]]:
    """The rows of a split, and where they stand.

    Raises:
        BadFile: A file cannot be read to its end.
    """
    counts = {part: 0 for part in parts}
    if "[" in split:  # a share is of all of them
        counts = {part: sum(1 for _ in _each(files)) for part, files in parts.items()}
    for one in ReadInstruction.from_spec(split).to_absolute(counts):
        ends = (one.from_, one.to) if "[" in split else (None, None)
        yield from islice(_each(parts[one.splitname]), *ends)


def _each(files: list[Path]) -> Iterator[tuple[Place, Row]]:
    for file in files:
        for line, row in read_placed(file):
            yield Place(str(file), line), row


def _names(builder: DatasetBuilder, folder: Path, wanted: list[str]) -> dict[str, list[str]] | None:
    """The names of the files of some splits."""
    config = builder.config
    plain = type(config)(name=config.name)
    fields = [one.name for one in dataclasses.fields(config) if one.name not in _OF_ANY]
    declared = Features(builder.info.features or {})
    if any(getattr(config, one) != getattr(plain, one) for one in fields if one != "features"):
        return None
    if any(isinstance(kind, ClassLabel) for kind in declared.values()):
        return None
    if missing := [part for part in wanted if part not in config.data_files]:
        raise ValueError(f"there is no split `{missing[0]}`; there is {', '.join(config.data_files)}")
    names = {
        part: [Path(one).relative_to(folder).as_posix() for one in config.data_files[part]] for part in wanted
    }  # fmt: skip
    return names if all(suffix(one) in LIGHT_SUFFIXES for files in names.values() for one in files) else None
