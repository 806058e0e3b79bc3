"""Reads rows from a file, the Hub or a built-in world and turns them into a trainer's rows, with a ledger of losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset

from alignctl.data import quickstart
from alignctl.data.formats import FORMATS, Format, detect_format, unpair
from alignctl.data.kept import kept, read_rows, write_rows, write_some
from alignctl.data.messages import BadRow, is_messages
from alignctl.data.scanning import prompt_keys
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, first_bad_line
from alignctl.errors import AlignctlError, RequestError
from alignctl.methods.registry import EVERY_OTHER_COLUMN, RowColumn

_SHOWN_BAD_ROWS = 5
_DETECT_ROWS = 20
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_MARGIN = "margin"  # the column that `data.margin` says how to make
_NUMBER = "alignctl: number"  # a column of files of rows: which row of the source it was; of a name that no source has
_AT_ONCE = 1_000  # rows
_ROWS = ".arrow"
_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Ledger:
    """What became of the rows of one source."""

    source: str
    format: str
    read: int
    kept: int
    skipped: dict[int, str]
    """Row number, counted from 1, and why the row cannot be used."""


@dataclass(frozen=True)
class Rows:
    """Rows in a trainer's form."""

    dataset: Dataset
    format: Format
    ledger: Ledger
    numbers: list[int]
    """Which row of the source each row was, counted from 1."""
    columns: tuple[RowColumn, ...] = ()
    """What the rows have beside their texts for the method that they were read for."""

    def select(self, indices: list[int]) -> Rows:
        """Some of the rows, in the order of their indices."""
        return replace(self, dataset=self.dataset.select(indices), numbers=[self.numbers[i] for i in indices])


class Source(NamedTuple):
    """Where rows come from."""

    path: str
    split: str
    """Of a data set on the Hub."""
    part: Literal["train", "test"]
    """Of a built-in world."""
    limit: int | None
    """At most so many of the first rows."""


def read_split(
    settings: DataSettings,
    kind: str,
    seed: int,
    columns: tuple[RowColumn, ...] = (),
    count: Callable[[int], None] = lambda rows: None,
) -> tuple[Rows, Rows | None]:
    """Reads training rows and held-out rows, with those of the columns that the data has.

    Held-out rows come from `eval_path` or `eval_split`, else they are taken out of the training rows, whole prompts at
    a time, so that no prompt is on both sides. One process does it, and those that ask for the same take what it made.

    Args:
        count: Is told of more rows that were read, as it goes.

    Raises:
        RequestError: A source cannot be read, has no rows of this kind, or has bad rows and `on_bad_row` is fail.
    """
    sources = [Source(settings.path, settings.split, "train", settings.limit)]
    if settings.eval_path or settings.eval_split or settings.path in BUILTIN_SOURCES:
        path, split = settings.eval_path or settings.path, settings.eval_split or "train"
        sources.append(Source(path, split, "test", settings.eval_limit))
    raw = [_load(settings, source, kind) for source in sources]
    told = [asdict(settings), [asdict(column) for column in columns]]
    # The library's own name for what it loaded, which another content has another of.
    names = [rows._fingerprint for rows in raw]

    def make(folder: Path) -> None:
        reader = _Reader(settings, kind, folder, count)
        train = reader.read(sources[0], raw[0], columns, "read" if len(sources) == 1 else "train")
        if len(sources) == 1:
            _hold_out(train, settings, seed, folder)
            return
        # `data.margin` is said of the training rows; others are measured without margins.
        others = tuple(column for column in columns if column.name != _MARGIN)
        held_out = reader.read(sources[1], raw[1], others, "eval")
        for column in others:
            if column in train.columns and column not in held_out.columns:
                raise RequestError(
                    f"the training rows have the column `{column.name}`, and the held-out rows of {sources[1].path} "
                    "do not",
                    "add it, or take it out of both",
                )
        _describe(train, folder, "train")
        _describe(held_out, folder, "eval")

    folder = kept(["rows", kind, seed, *told, names], make)
    return _described(folder, "train"), _described(folder, "eval")


def as_kind(rows: Rows, kind: str) -> Rows:
    """Rows as another kind that can be made of them (see data/formats.py).

    Raises:
        RequestError: They are no rows of that kind.
    """
    if kind == "feedback":
        return _unpaired(rows)
    if "prompt" not in rows.dataset.column_names:
        raise RequestError(
            f"the rows of {rows.ledger.source} are whole conversations or texts: there are no prompts to answer",
            "give rows with a column `prompt`",
        )
    return rows


def _unpaired(rows: Rows) -> Rows:
    """Preferences as feedback: each completion of a pair by itself, with what else the pair has."""
    features, own = dict(rows.dataset.features), [column.name for column in rows.columns]
    features = {name: features[name] for name in own} | {
        "prompt": features["prompt"], "completion": features["chosen"], "label": Value("bool"),
    }  # fmt: skip
    pairs = rows.dataset

    def make(folder: Path) -> None:
        batches = (_unpair_batch(batch, own) for batch in pairs.iter(_AT_ONCE))
        write_rows(folder / f"single{_ROWS}", Features(features), batches)

    folder = kept(["unpaired", pairs._fingerprint, own], make)
    numbers = [number for number in rows.numbers for _ in range(2)]
    return replace(rows, dataset=read_rows(folder / f"single{_ROWS}"), numbers=numbers)


def _unpair_batch(batch: dict[str, list[Any]], own: list[str]) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    singles = [{name: row[name] for name in own} | single for row in rows for single in unpair(row)]
    return {column: [single[column] for single in singles] for column in ("prompt", "completion", "label", *own)}


def as_plain_text(rows: Rows, where: str) -> Rows:
    """Rows for a tokenizer without chat template: messages written as the format's customary plain text.

    Raises:
        RequestError: The format has no such form.
    """
    first = rows.dataset[0]
    if not any(is_messages(value) for value in first.values()):
        return rows
    if rows.format.as_text is None:
        raise RequestError(
            f"the rows of {rows.ledger.source} are conversations, but the tokenizer of {where} has no chat template",
            "give one with `model.chat_template=FILE` (Jinja), or start from a chat model",
        )
    messages = rows.dataset
    features = {name: kind if kind != _MESSAGES else Value("string") for name, kind in messages.features.items()}

    def make(folder: Path) -> None:
        batches = (_plain_text_batch(batch, rows.format.as_text) for batch in messages.iter(_AT_ONCE))
        write_rows(folder / f"plain{_ROWS}", Features(features), batches)

    folder = kept(["plain text", messages._fingerprint, rows.format.name], make)
    return replace(rows, dataset=read_rows(folder / f"plain{_ROWS}"))


def _plain_text_batch(batch: dict[str, list[Any]], as_text: Any) -> dict[str, list[Any]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    plain = [row | _plain_text(row, as_text) for row in rows]
    return {name: [row[name] for row in plain] for name in batch}


def _plain_text(row: dict[str, Any], as_text: Any) -> dict[str, str]:
    prompt = as_text(row["prompt"])
    # A completion follows its prompt after a space, unless the prompt ends a line.
    gap = "" if prompt.endswith("\n") else " "
    return {
        key: prompt if key == "prompt" else gap + row[key][-1]["content"]
        for key in ("prompt", "chosen", "rejected", "completion")
        if key in row and is_messages(row[key])
    }


class _Reader(NamedTuple):
    """Turns sources into files of rows in a trainer's form."""

    settings: DataSettings
    kind: str
    folder: Path
    count: Callable[[int], None]

    def read(self, source: Source, raw: Dataset, columns: tuple[RowColumn, ...], name: str) -> Rows:
        """The rows of a source, in a file of that name."""
        settings, path = self.settings, source.path
        if source.limit is not None:
            raw = raw.select(range(min(source.limit, len(raw))))
        if len(raw) == 0:
            raise RequestError(f"{path} has no rows")
        try:
            row_format = detect_format(raw.select(range(min(len(raw), _DETECT_ROWS))), self.kind, settings.format)
        except ValueError as error:
            raise RequestError(f"{path}: {error}") from error
        own = _sources(raw, columns, settings.margin, path)
        others_for = self.kind if EVERY_OTHER_COLUMN in columns else None
        rows = _convert(raw, row_format, path, own, others_for, self.folder / f"{name}{_ROWS}", self.count)
        if rows.ledger.skipped and settings.on_bad_row == "fail":
            raise RequestError(
                f"{path}: {describe_skipped(rows.ledger)}", "mend or remove them, or set `data.on_bad_row=skip`"
            )
        if rows.ledger.kept == 0:
            raise RequestError(f"{path}: no row can be used: {describe_skipped(rows.ledger)}")
        return rows


def _describe(rows: Rows, folder: Path, part: str) -> None:
    """Writes what is to be known of a file of rows beside them."""
    facts = {
        "format": rows.format.name,
        "ledger": asdict(rows.ledger),
        "columns": [asdict(column) for column in rows.columns],
    }
    (folder / f"{part}.json").write_text(json.dumps(facts), encoding="utf-8")


def _described(folder: Path, part: str) -> Rows | None:
    """Rows as they were written, or None where there are none."""
    file = folder / f"{part}.json"
    if not file.exists():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    skipped = {int(number): reason for number, reason in facts["ledger"]["skipped"].items()}
    return _rows_of(
        folder / f"{part}{_ROWS}",
        FORMATS[facts["format"]],
        Ledger(**facts["ledger"] | {"skipped": skipped}),
        tuple(RowColumn(**column) for column in facts["columns"]),
    )


def _rows_of(file: Path, row_format: Format, ledger: Ledger, columns: tuple[RowColumn, ...]) -> Rows:
    dataset = read_rows(file)
    return Rows(dataset.remove_columns(_NUMBER), row_format, ledger, dataset.data.column(_NUMBER).to_pylist(), columns)


def describe_skipped(ledger: Ledger) -> str:
    """Names the first skipped rows with their reasons."""
    shown = [f"row {number}: {reason}" for number, reason in list(ledger.skipped.items())[:_SHOWN_BAD_ROWS]]
    more = f"; and {len(ledger.skipped) - len(shown)} more" if len(ledger.skipped) > len(shown) else ""
    return f"{len(ledger.skipped)} of {ledger.read} rows cannot be used ({'; '.join(shown)}{more})"


def _load(settings: DataSettings, source: Source, kind: str) -> Dataset:
    """The rows of a source as they are."""
    path = source.path
    if path in BUILTIN_SOURCES:
        make = quickstart.demonstrations if kind == "demonstrations" else quickstart.preferences
        return Dataset.from_list(make(source.part))
    file = Path(path)
    try:
        if file.is_file():
            return load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train")
        loaded = load_dataset(path, name=settings.name, split=source.split)
    except Exception as error:  # the library raises dozens of kinds; each means that the rows could not be had
        if file.suffix == ".jsonl" and (bad := first_bad_line(file)):
            raise RequestError(f"{path}: {bad}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = None if file.is_file() else "is the id right, and the Hub reachable? A gated set needs HF_TOKEN"
        raise AlignctlError(f"cannot read {path}: {reason}", hint) from error
    assert not isinstance(loaded, DatasetDict)
    return loaded


def _sources(
    raw: Dataset, columns: tuple[RowColumn, ...], margin: str | list[str] | None, source: str
) -> dict[RowColumn, list[str]]:
    """The declared columns that the rows have, and what each is made of: one column, or for the margin two to subtract.

    Raises:
        RequestError: A column that `data.margin` names is not there.
    """
    named = [column for column in columns if column != EVERY_OTHER_COLUMN]
    own = {column: [column.name] for column in named if column.name in raw.column_names}
    for column in named:
        if column.name == _MARGIN and margin is not None:
            own[column] = [margin] if isinstance(margin, str) else margin
            for name in own[column]:
                if name not in raw.column_names:
                    raise RequestError(
                        f"`data.margin` names the column `{name}`, which {source} does not have",
                        f"it has {', '.join(raw.column_names)}",
                    )
    return {column: names for column, names in own.items() if names}


def _convert(
    raw: Dataset,
    row_format: Format,
    source: str,
    own: dict[RowColumn, list[str]],
    others_for: str | None,
    file: Path,
    count: Callable[[int], None],
) -> Rows:
    """Rows in a trainer's form.

    Args:
        own: The declared columns, and what of the source each is made of.
        others_for: The kind of rows that keep all other columns, too; None where they are dropped.
        file: Where they are written.
        count: Is told of more rows that were read.
    """
    texts = _text_columns(raw, row_format, source)
    columns = texts | {column.name: Value("float32") if column.number else raw.features[column.name] for column in own}
    others = {name: kind for name, kind in raw.features.items() if others_for and name not in columns}
    kept_columns = [*others, *columns]
    skipped: dict[int, str] = {}

    def batches() -> Iterator[dict[str, list[Any]]]:
        convert = partial(_convert_row, convert=row_format.convert, own=own)
        messages = {name: kind == _MESSAGES for name, kind in texts.items()}
        first = 1
        for batch in raw.iter(_AT_ONCE):
            batch = {name: batch[name] for name in raw.column_names}
            converted = {name: [] for name in [*kept_columns, _NUMBER]}
            for number, values in enumerate(zip(*batch.values(), strict=True), start=first):
                row = dict(zip(batch, values, strict=True))
                try:
                    row = {name: row[name] for name in others} | convert(row, messages) | {_NUMBER: number}
                except BadRow as error:
                    skipped[number] = str(error)
                    continue
                for name, values in converted.items():
                    values.append(row[name])
            read = len(next(iter(batch.values())))
            first += read
            count(read)
            yield converted

    write_rows(file, Features(others | columns | {_NUMBER: Value("int64")}), batches())
    ledger = Ledger(source, row_format.name, len(raw), len(raw) - len(skipped), skipped)
    carried = tuple(own)
    if others_for:
        # Of rows of another kind that are taken as prompts, the completions are other columns.
        known = {"prompt"} if others_for == "prompts" else set(texts)
        known |= {column.name for column in own}
        carried += tuple(replace(EVERY_OTHER_COLUMN, name=name) for name in kept_columns if name not in known)
    return _rows_of(file, row_format, ledger, carried)


def _convert_row(
    row: dict[str, Any], messages: dict[str, bool], convert: Any, own: dict[RowColumn, list[str]]
) -> dict[str, Any]:
    """One converted row. `messages` says which columns of text hold some.

    Raises:
        BadRow: It cannot be used.
    """
    if None in row.values():
        row = {key: value for key, value in row.items() if value is not None}
    try:
        converted = convert(row)
        values = {column.name: _value(row, column, names) for column, names in own.items()}
    except KeyError as error:
        raise BadRow(f"the column {error} is missing or empty") from error
    for column, are_messages in messages.items():
        if is_messages(converted.get(column)) != are_messages:
            raise BadRow(f"`{column}` is {'text' if are_messages else 'messages'}, unlike in the first row")
    return converted | values


def _value(row: dict[str, Any], column: RowColumn, names: list[str]) -> Any:
    """What a row has in a declared column; of two columns of numbers, the first less the second.

    Raises:
        BadRow: It is no number, where it has to be.
        KeyError: There is nothing, where there has to be something.
    """
    needed = column.missing is None or len(names) > 1  # half of a difference says nothing
    values = [row[name] if needed else row.get(name, column.missing) for name in names]
    if not column.number:
        return values[0]
    try:
        first, *others = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise BadRow(f"the {column.name} is not a number: {error}") from error
    if not math.isfinite(value := first - sum(others)):
        raise BadRow(f"the {column.name} is not a finite number: {value}")
    return value


def _text_columns(raw: Dataset, row_format: Format, source: str) -> dict[str, Any]:
    """Columns of the format's rows and their types, from the first row that can be used."""
    reason = ""
    for row in raw:
        try:
            converted = row_format.convert({key: value for key, value in row.items() if value is not None})
        except BadRow as error:
            reason = reason or str(error)
            continue
        except KeyError as error:
            reason = reason or f"the column {error} is missing or empty"
            continue
        return {key: _type(value) for key, value in converted.items()}
    raise RequestError(
        f"{source}: none of {len(raw):,} rows can be used; row 1: {reason}",
        f"the format `{row_format.name}` needs {row_format.columns}",
    )


def _type(value: Any) -> Any:
    return _MESSAGES if is_messages(value) else Value("bool" if isinstance(value, bool) else "string")


def _hold_out(rows: Rows, settings: DataSettings, seed: int, folder: Path) -> None:
    """Splits off up to `eval_rows` rows, the same ones for the same seed, whatever the order of the rows; writes and
    describes both parts."""
    wanted = min(settings.eval_rows, len(rows.dataset) // 5)  # never more than a fifth
    by_prompt: dict[bytes, list[int]] = {}
    if wanted:
        for index, key in enumerate(prompt_keys(rows.dataset, seed)):
            by_prompt.setdefault(key, []).append(index)
    held: list[int] = []
    for key in sorted(by_prompt):
        if len(held) + len(by_prompt[key]) <= wanted:
            held += by_prompt[key]
    file = folder / f"read{_ROWS}"
    if not held:
        file.rename(folder / f"train{_ROWS}")
        _describe(rows, folder, "train")
        return
    is_held = np.zeros(len(rows.dataset), bool)
    is_held[held] = True
    for part, chosen in (("train", ~is_held), ("eval", is_held)):
        write_some(file, folder / f"{part}{_ROWS}", chosen)
        _describe(replace(rows, ledger=replace(rows.ledger, kept=int(chosen.sum()))), folder, part)
    file.unlink()
