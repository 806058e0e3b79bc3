"""Rows as a source has them: a file, a data set on the Hub, a built-in world. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, load_dataset

from alignctl.data import quickstart
from alignctl.data.fetching import fetch
from alignctl.data.files import BadFile, Row, class_namer, read_placed
from alignctl.data.hub import hub_files, rows_of
from alignctl.data.places import Place
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, digest, files_of, is_on_this_machine, is_url
from alignctl.errors import AlignctlError, RequestError

_AT_ONCE = 1_000  # rows
_SAID = 600  # characters of what a library says


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    path: str
    """As people are told it."""
    given: str | list[str]
    """As `data.path` has it."""
    split: str
    """Of a data set on the Hub."""
    part: Literal["train", "test"]
    """Of a built-in world."""
    limit: int | None
    """At most so many of the first rows."""


@dataclass(frozen=True)
class RawRows:
    """Rows as they are, which can be gone through again and again."""

    source: Source
    content: str
    """Says what all rows are: no others have the same."""
    each: Callable[[], Iterator[tuple[Place | None, Row]]]
    """Rows, and where they stand. Raises BadFile."""
    files: Sequence[Path] = ()
    """Where they are, if they are in files."""

    def __iter__(self) -> Iterator[Row]:
        """As `placed`."""
        for _, row in self.placed():
            yield row

    def placed(self) -> Iterator[tuple[Place | None, Row]]:
        """Rows, and where they stand if that is in a file.

        Raises:
            RequestError: The source is not what it says it is.
        """
        try:
            yield from islice(self.each(), self.source.limit)
        except BadFile as error:
            raise RequestError(f"{self.source.path}: {error}", error.hint) from error


def column_types(rows: Iterable[Row]) -> dict[str, pa.DataType | None]:
    """All columns that any of some rows has, in the order in which they come; None for one of which the values are of
    several types. A whole number is of another type than one with a point."""
    types: dict[str, pa.DataType | None] = {}
    rows = iter(rows)
    while batch := list(islice(rows, _AT_ONCE)):
        for name in dict.fromkeys(name for row in batch for name in row):
            seen = types.get(name, pa.null())
            types[name] = None if seen is None else _common_type(name, seen, [row.get(name) for row in batch])
    return types


def _common_type(name: str, seen: pa.DataType, values: list[Any]) -> pa.DataType | None:
    """A type for values of a column and for others of another type; None where there is none."""
    try:
        schemas = [pa.schema([(name, kind)]) for kind in (seen, pa.array(values).type)]
        common = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except (pa.ArrowException, OverflowError, ValueError):
        return None
    return None if _differs(seen, common) or _makes_floats(common, values) else common


def _differs(seen: pa.DataType, common: pa.DataType) -> bool:
    """Whether whole numbers of a type would be others in another one."""
    if pa.types.is_integer(seen):
        return pa.types.is_floating(common)
    if pa.types.is_struct(seen) and pa.types.is_struct(common):
        return any(_differs(field.type, common.field(field.name).type) for field in seen)
    return pa.types.is_list(seen) and pa.types.is_list(common) and _differs(seen.value_type, common.value_type)


def _makes_floats(kind: pa.DataType, values: Iterable[Any]) -> bool:
    """Whether whole numbers among values would be others in a type."""
    values = [value for value in values if value is not None]
    if pa.types.is_floating(kind):
        return any(isinstance(value, int) for value in values)
    if pa.types.is_list(kind):
        return _makes_floats(kind.value_type, (one for value in values for one in value))
    if pa.types.is_struct(kind):
        return any(_makes_floats(field.type, [value.get(field.name) for value in values]) for field in kind)
    return False


def load_raw(
    settings: DataSettings, source: Source, kind: str, count_bytes: Callable[[int], None] = lambda more: None
) -> RawRows:
    """The rows of a source; of a file, none is read yet but its bytes.

    Args:
        count_bytes: Is told of more bytes that were fetched, as it goes.

    Raises:
        AlignctlError: They cannot be had.
    """
    path = source.path
    if source.given in BUILTIN_SOURCES:
        make = quickstart.demonstrations if kind == "demonstrations" else quickstart.preferences
        return RawRows(source, f"{path} {source.part}", lambda: ((None, row) for row in make(source.part)))
    if is_url(source.given) or is_on_this_machine(source.given):
        try:
            files = fetch(source.given, count_bytes) if is_url(source.given) else files_of(source.given)
            return RawRows(source, digest(*files), partial(_each_of_files, files), files)
        except BadFile as error:
            raise RequestError(f"{path}: {error}", error.hint) from error
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error}") from error
    try:
        parts = hub_files(path, settings.name, source.split, settings.revision)
        if parts is not None:
            files = [file for own in parts.values() for file in own]
            content = f"{source.split} {digest(*files)}"
            return RawRows(source, content, partial(rows_of, parts, source.split))
        loaded = load_dataset(path, name=settings.name, split=source.split, revision=settings.revision)
    except Exception as error:  # the library raises dozens of kinds; each means that the rows could not be had
        raise _not_loaded(path, error) from error
    assert not isinstance(loaded, DatasetDict)
    # The library's own name for what it loaded, which another content has another of.
    return RawRows(source, loaded._fingerprint, partial(_each, loaded))


def check_unchanged(rows: RawRows) -> None:
    """Whether what was read of a file is what it was known by.

    Raises:
        RequestError: The file was written to meanwhile.
    """
    if rows.files and digest(*rows.files) != rows.content:
        what = "the file was changed while it was" if len(rows.files) == 1 else "a file was changed while they were"
        raise RequestError(f"{rows.source.path}: {what} read", "start again once it is written")


def _not_loaded(path: str, error: Exception) -> AlignctlError:
    said = " ".join((str(error) or type(error).__name__).split())
    said = said[:_SAID] + ("..." if len(said) > _SAID else "")
    if "onfig name is missing" in said:
        return RequestError(f"{path} has several configurations: {said}", "choose one with `data.name=...`")
    return AlignctlError(
        f"cannot read {path}: {said}", "is the id right, and the Hub reachable? A gated set needs HF_TOKEN"
    )


def _each_of_files(files: Sequence[Path]) -> Iterator[tuple[Place, Row]]:
    for file in files:
        try:
            for line, row in read_placed(file):
                yield Place(str(file), line), row
        except BadFile as error:
            raise error if len(files) == 1 else BadFile(f"{file.name}: {error}", error.hint) from error


def _each(rows: Dataset) -> Iterator[tuple[None, Row]]:
    named = class_namer(Features(rows.features).to_dict())
    for batch in rows.iter(_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            yield None, named(row) if named else row
