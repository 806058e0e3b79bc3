"""Turns the rows of a source into a file of rows in a trainer's form, and counts what cannot be turned. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value
from datasets.arrow_writer import ArrowWriter

from alignctl.data.cleaning import MESSAGE_KEYS, is_bare
from alignctl.data.converters import BEFORE, has_weights
from alignctl.data.files import Row
from alignctl.data.formats import Format, weighed
from alignctl.data.kept import read_rows, write_rows
from alignctl.data.labels import signs, without_zeros
from alignctl.data.mapping import Reading
from alignctl.data.messages import NOTHING, BadRow, Tie, is_messages, writable
from alignctl.data.places import Placing, read_places
from alignctl.data.raw import RawRows, column_types
from alignctl.data.rows import Ledger, Rows
from alignctl.data.settings import DataSettings
from alignctl.data.tools import TOOLS
from alignctl.data.votes import agreement, vote_columns
from alignctl.errors import RequestError
from alignctl.methods.registry import EVERY_OTHER_COLUMN, RowColumn

MARGIN = "margin"
"""The column that `data.margin` says how to make."""
MESSAGES = List({"role": Value("string"), "content": Value("string")})
"""Type of columns of messages that have nothing else."""
RICH_MESSAGES = List(Json())  # each as it is: as a struct, all would have the keys of all
"""Type of columns of messages of which some have more."""
AT_ONCE = 1_000
"""Rows that are in memory."""
_NUMBER = "alignctl: number"  # a column of files of rows: which row of the source it was; of a name that no source has

_Give = Callable[[Row], list[dict[str, Any]]]


@dataclass(frozen=True)
class Beside:
    """What rows keep beside their texts."""

    declared: dict[RowColumn, list[str]] = field(default_factory=dict)
    """The columns that a method declares and the rows have, and what of the source each is made of: one column, or for
    the margin two to subtract."""
    others: dict[str, pa.DataType] = field(default_factory=dict)
    """All other columns of one type, where a method takes them."""
    types: dict[str, pa.DataType | None] = field(default_factory=dict)
    """Of all columns of the source and those that are made of them, if a method looks at any."""

    @classmethod
    def of(
        cls, raw: RawRows, reading: Reading, columns: tuple[RowColumn, ...], margin: str | list[str] | None
    ) -> Beside:
        """
        Args:
            columns: Those that a method declares.
            margin: What `data.margin` says.

        Raises:
            RequestError: A column is named that is not there, or one has values of several types.
        """
        if not columns:
            return cls()
        types = column_types(_widened(raw, reading))
        declared = {}
        for column in (column for column in columns if column != EVERY_OTHER_COLUMN):
            names = [column.name] if column.name in types else []
            if column.name == MARGIN and margin is not None:
                names = [margin] if isinstance(margin, str) else margin
                for name in (name for name in names if name not in types):
                    raise RequestError(
                        f"`data.margin` names the column `{name}`, which {raw.source.path} does not have",
                        f"it has {', '.join(types)}",
                    )
            if names:
                declared[column] = names
            if names and not column.number and types[column.name] is None:
                raise RequestError(
                    f"{raw.source.path}: the values of the column `{column.name}` are of several types",
                    "write all of them as text, all as whole numbers, or all as numbers with a point",
                )
        takes_others = EVERY_OTHER_COLUMN in columns
        others = {name: kind for name, kind in types.items() if kind is not None} if takes_others else {}
        return cls(declared, others, types)


def _widened(raw: RawRows, reading: Reading) -> Iterator[Row]:
    """Rows of a source with the columns that are made of them, where they can be made."""
    for row in raw:
        try:
            yield reading.widened(row)
        except BadRow:
            continue


def convert(
    raw: RawRows,
    reading: Reading,
    beside: Beside,
    settings: DataSettings,
    kind: str,
    file: Path,
    count: Callable[[int], None],
) -> Rows:
    """Rows in a trainer's form. Where a row has what those before it have not, all are converted anew.

    Args:
        reading: How they are read.
        kind: What is needed of the rows: of another kind that are taken as prompts, completions are other columns.
        file: Where they are written; beside it, where they stand in their source, see `places_beside`.
        count: Is told of more rows that were read.

    Raises:
        RequestError: None of them can be used.
    """
    shape, counted = _Shape(), 0

    def count_new(read: int) -> None:
        nonlocal counted
        count(max(read - counted, 0))
        counted = max(read, counted)

    while True:
        try:
            return _convert(raw, reading, beside, settings, kind, file, count_new, shape)
        except _Wider as wider:
            shape = wider.shape
            if shape.weighed:
                reading = replace(reading, format=weighed(reading.format))


@dataclass(frozen=True)
class _Shape:
    """What rows have that makes the form of all of them another."""

    before: frozenset[str] = frozenset()
    """Columns of what goes before a prompt: then all are messages."""
    bare: bool = True
    """Whether messages have nothing but role and content."""
    weighed: bool = False
    """Whether some messages are not trained on: then each answer that is, is a row of its own."""
    signed: bool = False
    """Whether labels are 1, 0 and -1: then 0 is neither side."""


class _Wider(Exception):
    """A row does not have the shape of those before it."""

    def __init__(self, shape: _Shape):
        super().__init__()
        self.shape = shape


def _convert(
    raw: RawRows,
    reading: Reading,
    beside: Beside,
    settings: DataSettings,
    kind: str,
    file: Path,
    count: Callable[[int], None],
    shape: _Shape,
) -> Rows:
    """As `convert`, of rows of one shape. `count` is told of the rows read so far.

    Raises:
        _Wider: There is a row of another one.
    """
    row_format = reading.format
    give = partial(_given, reading=reading, most=settings.max_pairs, shape=shape)
    judged = row_format.kind == kind == "feedback" and not shape.signed
    seen_signs: set[str] = set()
    may_be_weighed = settings.format == "auto" and weighed(row_format) != row_format
    texts = _text_columns(raw, reading, give, shape)
    kinds = {
        column.name: Value("float32") if column.number else _feature(beside.types[column.name])
        for column in beside.declared
    }
    others = {name: _feature(kind) for name, kind in beside.others.items() if name not in texts | kinds}
    kept = [*others, *texts, *kinds]
    messages = {name: holds_messages(kind) for name, kind in texts.items()}
    skipped: dict[int, str] = {}
    read, usable = 0, 0
    seen: set[str] = set()
    placing = Placing()
    ties: list[int] = []
    voting: set[str] = set()
    agreements: list[float | None] = []

    def batches() -> Iterator[dict[str, list[Any]]]:
        nonlocal read, usable, seen_signs
        rows = raw.placed()
        while batch := list(islice(rows, AT_ONCE)):
            converted: dict[str, list[Any]] = {name: [] for name in [*kept, _NUMBER]}
            for number, (place, row) in enumerate(batch, start=read + 1):
                placing.add(place)
                seen.update(_carried(row, reading.uses))
                try:
                    row = reading.widened(row)
                    if may_be_weighed and has_weights(reading.seen(row)):
                        raise _Wider(replace(shape, weighed=True))
                    if judged and len(seen_signs := seen_signs | signs(row)) > 1:
                        raise _Wider(replace(shape, signed=True))
                    if row_format.votes:
                        voting.update(vote_columns(row))
                        agreements.append(agreement(row_format.votes(row)))
                    for one in _checked(row, give, messages, beside.declared):
                        values = {name: row.get(name) for name in others} | one | {_NUMBER: number}
                        for name, column in converted.items():
                            column.append(values[name])
                    usable += 1
                except Tie:
                    ties.append(number)
                except BadRow as error:
                    skipped[number] = str(error)
            read += len(batch)
            count(read)
            yield converted

    try:
        write_rows(file, Features(others | texts | kinds | {_NUMBER: Value("int64")}), batches())
    except pa.ArrowException as error:  # inside of a column: numbers of several types, or hundreds of levels
        raise RequestError(
            f"{raw.source.path}: a column cannot be kept as it is: {' '.join(str(error).split())}",
            "write it as text, or take it out",
        ) from error
    looked_at = reading.uses.union(others, voting, *beside.declared.values())
    placing.write(places_beside(file))
    agreed = [alike for alike in agreements if alike is not None]
    ledger = Ledger(
        source=raw.source.path,
        format=row_format.name,
        read=read,
        kept=usable,
        skipped=skipped,
        unused=sorted(map(writable, seen - looked_at)),
        ties=ties,
        agreement=sum(agreed) / len(agreed) if agreed else None,
    )
    carried = tuple(beside.declared)
    if beside.others:
        known = {"prompt"} if kind == "prompts" else set(texts)
        carried += tuple(replace(EVERY_OTHER_COLUMN, name=name) for name in kept if name not in known | kinds.keys())
    return rows_of(file, row_format, ledger, carried, placing.files, places_beside(file))


def places_beside(file: Path) -> Path:
    """Where the places of the rows of such a file are written."""
    return file.with_suffix(".places.npy")


def _carried(row: Row, uses: frozenset[str]) -> Iterator[str]:
    """What a row has: columns, and in messages what no format knows, after a point."""
    for name, value in row.items():
        if value is None:
            continue
        yield name
        if name in uses and name not in TOOLS and isinstance(value, list):
            for one in value:
                if isinstance(one, dict):
                    yield from (f"{name}.{key}" for key in one.keys() - MESSAGE_KEYS if one[key] is not None)


def rows_of(
    file: Path,
    row_format: Format,
    ledger: Ledger,
    columns: tuple[RowColumn, ...],
    files: list[str],
    places: Path,
) -> Rows:
    """The rows of such a file.

    Args:
        files: Of the source.
        places: Where rows stand in them.
    """
    dataset, numbers = read_numbered(file)
    return Rows(dataset, row_format, ledger, numbers, columns, read_places(places, files))


def write_numbered(rows: Dataset, numbers: np.ndarray, chosen: np.ndarray, file: Path) -> None:
    """Writes some rows with their numbers, int64 `[rows]`, in the order of their indices, as a file that
    `read_numbered` takes."""
    with ArrowWriter(features=Features(rows.features | {_NUMBER: Value("int64")}), path=str(file)) as writer:
        for start in range(0, len(chosen), AT_ONCE):
            indices = chosen[start : start + AT_ONCE]
            table = rows.select(indices).with_format("arrow")[:]
            writer.write_table(table.append_column(_NUMBER, pa.array(numbers[indices])))
        writer.finalize()


def read_numbered(file: Path) -> tuple[Dataset, list[int]]:
    """Rows of a file, and their numbers."""
    dataset = read_rows(file)
    return dataset.remove_columns(_NUMBER), dataset.data.column(_NUMBER).to_pylist()


def _feature(kind: pa.DataType) -> Any:
    return Features.from_arrow_schema(pa.schema([("it", kind)]))["it"]


def _given(row: Row, reading: Reading, most: int, shape: _Shape) -> list[dict[str, Any]]:
    """What a widened row of a source gives, as its format has it.

    Raises:
        BadRow: It cannot be used.
        _Wider: It has another shape.
    """
    row = without_zeros(row) if shape.signed else row
    row = {name: value for name, value in reading.seen(row).items() if name not in TOOLS or value not in NOTHING}
    if more := {name for name in BEFORE if name in row and name in reading.format.uses} - shape.before:
        raise _Wider(replace(shape, before=shape.before | more))
    row = dict.fromkeys(shape.before, "") | row
    if None in row.values():  # an empty cell of what goes before a prompt is still one
        row = {key: "" if value is None else value for key, value in row.items() if value is not None or key in BEFORE}
    try:
        given = _capped(reading.format.rows(row), most)
    except KeyError as error:
        raise BadRow(f"the column {error} is missing or empty") from error
    for one in given:
        for column, value in one.items():
            if shape.bare and is_messages(value) and not is_bare(value):
                raise _Wider(replace(shape, bare=False))
            _check_characters(column, value)
    return given


def _is_kept(value: Any) -> bool:
    """Whether the library `datasets` (5.2) keeps a value as JSON: it writes ten digits of a number, and reads some of
    them otherwise."""
    kept = Json()
    try:
        return kept.decode_example(kept.encode_example(value)) == value
    except ValueError:  # beyond 64 bits
        return False


def _capped(given: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the rows with one prompt, which lie one behind another."""
    if len(given) <= most:
        return given
    return [one for _, same in groupby(given, key=itemgetter("prompt")) for one in islice(same, most)]


def _check_characters(column: str, value: Any) -> None:
    """
    Raises:
        BadRow: It cannot be written down.
    """
    try:
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
        if (column == "tools" or (is_messages(value) and not is_bare(value))) and not _is_kept(value):
            raise BadRow(f"`{column}` has a number that would be rounded: write it with fewer digits, or as text")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise BadRow(f"`{column}` has half of a character, `{half}`: no text can have that") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"`{column}` has what JSON has not: {error}") from error


def _checked(
    row: Row,
    give: _Give,
    messages: dict[str, bool],
    declared: dict[RowColumn, list[str]],
) -> list[dict[str, Any]]:
    """What a row gives, with what a method declares. `messages` says which columns of text hold some.

    Raises:
        BadRow: It cannot be used.
    """
    given = give(row)
    try:
        values = {column.name: _value(row, column, names) for column, names in declared.items()}
    except KeyError as error:
        raise BadRow(f"the column {error} is missing or empty") from error
    for one in given:
        for column, are_messages in messages.items():
            if is_messages(one.get(column)) != are_messages:
                raise BadRow(f"`{column}` is {'text' if are_messages else 'messages'}, unlike in the first row")
    return [one | values for one in given]


def _value(row: Row, column: RowColumn, names: list[str]) -> Any:
    """What a row has in a declared column; of two columns of numbers, the first less the second.

    Raises:
        BadRow: It is no number, where it has to be.
        KeyError: There is nothing, where there has to be something.
    """
    values = [row.get(name) for name in names]
    for name in (name for name, value in zip(names, values, strict=True) if value is None):
        if column.missing is None or len(names) > 1:  # half of a difference says nothing
            raise KeyError(name)
    values = [column.missing if value is None else value for value in values]
    if not column.number:
        return values[0]
    try:
        first, *others = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"the {column.name} is not a number: {error}") from error
    if not math.isfinite(value := first - sum(others)):
        raise BadRow(f"the {column.name} is not a finite number: {value}")
    return value


def _text_columns(raw: RawRows, reading: Reading, give: _Give, shape: _Shape) -> dict[str, Any]:
    """Columns of the format's rows and their types, from the first row that can be used."""
    reason, read = "", 0
    for row in raw:
        read += 1
        try:
            first, *_ = give(reading.widened(row))
        except BadRow as error:
            reason = reason or str(error)
            continue
        return {key: _type(key, value, shape) for key, value in first.items()}
    raise RequestError(
        f"{raw.source.path}: none of {read:,} rows can be used; row 1: {reason}",
        f"the format `{reading.format.name}` needs {reading.format.columns}",
    )


def _type(column: str, value: Any, shape: _Shape) -> Any:
    if column == "tools":
        return Json()
    if is_messages(value):
        return MESSAGES if shape.bare else RICH_MESSAGES
    return Value("bool" if isinstance(value, bool) else "string")


def holds_messages(kind: Any) -> bool:
    """Whether a column of this type holds messages."""
    return kind in (MESSAGES, RICH_MESSAGES)
