"""Reads rows from a file, the Hub or a built-in world and turns them into a trainer's rows, with a ledger of losses."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset

from alignctl.data import quickstart
from alignctl.data.formats import Format, detect_format, unpair
from alignctl.data.messages import BadRow, Messages, is_messages
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, first_bad_line
from alignctl.errors import AlignctlError, RequestError
from alignctl.methods.registry import EVERY_OTHER_COLUMN, RowColumn

_SHOWN_BAD_ROWS = 5
_DETECT_ROWS = 20
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_MARGIN = "margin"  # the column that `data.margin` says how to make
_REASON = "alignctl: why not"  # a column for the time of reading; of a name that no source has
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
    settings: DataSettings, kind: str, seed: int, columns: tuple[RowColumn, ...] = ()
) -> tuple[Rows, Rows | None]:
    """Reads training rows and held-out rows, with those of the columns that the data has.

    Held-out rows come from `eval_path` or `eval_split`, else they are taken out of the training rows, whole prompts at
    a time, so that no prompt is on both sides.

    Raises:
        RequestError: A source cannot be read, has no rows of this kind, or has bad rows and `on_bad_row` is fail.
    """
    train = _read(settings, Source(settings.path, settings.split, "train", settings.limit), kind, columns)
    if settings.eval_path or settings.eval_split or settings.path in BUILTIN_SOURCES:
        path, split = settings.eval_path or settings.path, settings.eval_split or "train"
        # `data.margin` is said of the training rows; others are measured without margins.
        columns = tuple(column for column in columns if column.name != _MARGIN)
        held_out = _read(settings, Source(path, split, "test", settings.eval_limit), kind, columns)
        for column in columns:
            if column in train.columns and column not in held_out.columns:
                raise RequestError(
                    f"the training rows have the column `{column.name}`, and the held-out rows of {path} do not",
                    "add it, or take it out of both",
                )
        return train, held_out
    if settings.eval_rows == 0:
        return train, None
    return _hold_out(train, settings, seed)


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
    return replace(
        rows,
        dataset=rows.dataset.map(
            _unpair_batch,
            batched=True,
            fn_kwargs={"own": own},
            remove_columns=rows.dataset.column_names,
            features=Features(features),
            desc="Taking pairs apart",
        ),
        numbers=[number for number in rows.numbers for _ in range(2)],
    )


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
    return replace(rows, dataset=rows.dataset.map(_plain_text, fn_kwargs={"as_text": rows.format.as_text}))


def _plain_text(row: dict[str, Any], as_text: Any) -> dict[str, str]:
    prompt = as_text(row["prompt"])
    # A completion follows its prompt after a space, unless the prompt ends a line.
    gap = "" if prompt.endswith("\n") else " "
    return {
        key: prompt if key == "prompt" else gap + row[key][-1]["content"]
        for key in ("prompt", "chosen", "rejected", "completion")
        if key in row and is_messages(row[key])
    }


def _read(settings: DataSettings, source: Source, kind: str, columns: tuple[RowColumn, ...]) -> Rows:
    raw, path = _load(settings, source, kind), source.path
    if source.limit is not None:
        raw = raw.select(range(min(source.limit, len(raw))))
    if len(raw) == 0:
        raise RequestError(f"{path} has no rows")
    try:
        row_format = detect_format(raw.select(range(min(len(raw), _DETECT_ROWS))), kind, settings.format)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error
    own = _sources(raw, columns, settings.margin, path)
    rows = _convert(raw, row_format, path, own, others_for=kind if EVERY_OTHER_COLUMN in columns else None)
    if rows.ledger.skipped and settings.on_bad_row == "fail":
        raise RequestError(
            f"{path}: {describe_skipped(rows.ledger)}", "mend or remove them, or set `data.on_bad_row=skip`"
        )
    if rows.ledger.kept == 0:
        raise RequestError(f"{path}: no row can be used: {describe_skipped(rows.ledger)}")
    return rows


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
    raw: Dataset, row_format: Format, source: str, own: dict[RowColumn, list[str]], others_for: str | None
) -> Rows:
    """Rows in a trainer's form.

    Args:
        own: The declared columns, and what of the file each is made of.
        others_for: The kind of rows that keep all other columns, too; None where they are dropped.
    """
    texts = _text_columns(raw, row_format, source)
    columns = texts | {column.name: Value("float32") if column.number else raw.features[column.name] for column in own}
    others = {name: kind for name, kind in raw.features.items() if others_for and name not in columns}
    converted = raw.map(
        _convert_row,
        fn_kwargs={
            "convert": row_format.convert,
            "texts": {k: v == _MESSAGES for k, v in texts.items()},
            "own": own,
        },
        remove_columns=[name for name in raw.column_names if name not in others],
        features=Features(others | {_REASON: Value("string")} | columns),
        desc=f"Reading {source}",
    )
    problems = converted[_REASON]
    skipped = {index + 1: problem for index, problem in enumerate(problems) if problem is not None}
    kept = converted.remove_columns(_REASON)
    numbers = [number for number in range(1, len(raw) + 1) if number not in skipped]
    if skipped:
        kept = kept.select([number - 1 for number in numbers])
    ledger = Ledger(source, row_format.name, len(raw), len(kept), skipped)
    carried = tuple(own)
    if others_for:
        # Of rows of another kind that are taken as prompts, the completions are other columns.
        known = {"prompt"} if others_for == "prompts" else set(texts)
        known |= {column.name for column in own}
        names = [name for name in kept.column_names if name not in known]
        carried += tuple(replace(EVERY_OTHER_COLUMN, name=name) for name in names)
    return Rows(kept, row_format, ledger, numbers, carried)


def _convert_row(
    row: dict[str, Any], convert: Any, texts: dict[str, bool], own: dict[RowColumn, list[str]]
) -> dict[str, Any]:
    """One converted row, or the reason why not and empty columns. `texts` says which columns hold messages."""
    try:
        if any(value is None for value in row.values()):
            row = {key: value for key, value in row.items() if value is not None}
        converted = convert(row)
        values = {column.name: _value(row, column, names) for column, names in own.items()}
        for column, messages in texts.items():
            if is_messages(converted.get(column)) != messages:
                raise BadRow(f"`{column}` is {'text' if messages else 'messages'}, unlike in the first row")
        return {_REASON: None, **converted, **values}
    except KeyError as error:
        reason = f"the column {error} is missing or empty"
    except BadRow as error:
        reason = str(error)
    return {_REASON: reason} | dict.fromkeys([*texts, *(column.name for column in own)])


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


def _hold_out(rows: Rows, settings: DataSettings, seed: int) -> tuple[Rows, Rows | None]:
    """Splits off up to `eval_rows` rows, the same ones for the same seed, whatever the order of the rows."""
    keys = [_prompt_key(row, seed) for row in rows.dataset]
    by_prompt: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        by_prompt.setdefault(key, []).append(index)
    wanted = min(settings.eval_rows, len(keys) // 5)  # never more than a fifth
    held: set[int] = set()
    for key in sorted(by_prompt):
        if len(held) + len(by_prompt[key]) <= wanted:
            held.update(by_prompt[key])
    if not held:
        return rows, None

    def part(indices: list[int]) -> Rows:
        return replace(rows.select(indices), ledger=replace(rows.ledger, kept=len(indices)))

    return part([i for i in range(len(keys)) if i not in held]), part(sorted(held))


def _prompt_key(row: dict[str, Any], seed: int) -> str:
    prompt: str | Messages = row.get("prompt") or row.get("text") or row["messages"][:-1]
    return hashlib.sha256(f"{seed}|{json.dumps(prompt)}".encode()).hexdigest()
