"""Reads rows from a file, the Hub or a built-in world and turns them into a trainer's rows, with a ledger of losses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset

from alignctl.data import quickstart
from alignctl.data.formats import Format, detect_format, unpair
from alignctl.data.messages import BadRow, Messages, is_messages
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, first_bad_line
from alignctl.errors import AlignctlError, RequestError

_SHOWN_BAD_ROWS = 5
_DETECT_ROWS = 20
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
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

    def select(self, indices: list[int]) -> Rows:
        """Some of the rows, in the order of their indices."""
        return replace(self, dataset=self.dataset.select(indices), numbers=[self.numbers[i] for i in indices])


def read_split(settings: DataSettings, kind: str, seed: int, with_margin: bool = False) -> tuple[Rows, Rows | None]:
    """Reads training rows and held-out rows, preferences with their margin if it is wanted.

    Prompts keep the other columns of their rows, for whoever scores the answers.

    Held-out rows come from `eval_path` or `eval_split`, else they are taken out of the training rows, whole prompts at
    a time, so that no prompt is on both sides.

    Raises:
        RequestError: A source cannot be read, has no rows of this kind, or has bad rows and `on_bad_row` is fail.
    """
    margin = settings.margin if with_margin else []
    train = _read(settings, settings.path, settings.split, "train", kind, settings.limit, margin)
    if settings.eval_path or settings.eval_split or settings.path in BUILTIN_SOURCES:
        path, split = settings.eval_path or settings.path, settings.eval_split or "train"
        return train, _read(settings, path, split, "test", kind, settings.eval_limit, [])
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
    """Preferences as feedback: each completion of a pair by itself."""
    features = dict(rows.dataset.features)
    features = {"prompt": features["prompt"], "completion": features["chosen"], "label": Value("bool")}
    return replace(
        rows,
        dataset=rows.dataset.map(
            _unpair_batch,
            batched=True,
            remove_columns=rows.dataset.column_names,
            features=Features(features),
            desc="Taking pairs apart",
        ),
        numbers=[number for number in rows.numbers for _ in range(2)],
    )


def _unpair_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    singles = [single for row in rows for single in unpair(row)]
    return {column: [single[column] for single in singles] for column in ("prompt", "completion", "label")}


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


def _read(
    settings: DataSettings,
    path: str,
    split: str,
    part: str,
    kind: str,
    limit: int | None,
    margin: str | list[str] | None,
) -> Rows:
    raw = _load(path, split, settings, part, kind)
    if limit is not None:
        raw = raw.select(range(min(limit, len(raw))))
    if len(raw) == 0:
        raise RequestError(f"{path} has no rows")
    try:
        row_format = detect_format(raw.select(range(min(len(raw), _DETECT_ROWS))), kind, settings.format)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error
    rows = _convert(raw, row_format, path, _margin(raw, margin, path), keep_others=kind == "prompts")
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


def _load(path: str, split: str, settings: DataSettings, part: str, kind: str) -> Dataset:
    """The rows of a source as they are."""
    if path in BUILTIN_SOURCES:
        make = quickstart.demonstrations if kind == "demonstrations" else quickstart.preferences
        return Dataset.from_list(make(part))
    file = Path(path)
    try:
        if file.is_file():
            return load_dataset(_LOADERS[file.suffix], data_files=str(file), split="train")
        loaded = load_dataset(path, name=settings.name, split=split)
    except Exception as error:  # the library raises dozens of kinds; each means that the rows could not be had
        if file.suffix == ".jsonl" and (bad := first_bad_line(file)):
            raise RequestError(f"{path}: {bad}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = None if file.is_file() else "is the id right, and the Hub reachable? A gated set needs HF_TOKEN"
        raise AlignctlError(f"cannot read {path}: {reason}", hint) from error
    assert not isinstance(loaded, DatasetDict)
    return loaded


def _margin(raw: Dataset, margin: str | list[str] | None, source: str) -> list[str]:
    """The columns that give a pair's margin: none, one, or two to subtract.

    Raises:
        RequestError: A column that was named is not there.
    """
    if margin is None:
        return ["margin"] if "margin" in raw.column_names else []
    columns = [margin] if isinstance(margin, str) else margin
    for column in columns:
        if column not in raw.column_names:
            raise RequestError(
                f"`data.margin` names the column `{column}`, which {source} does not have",
                f"it has {', '.join(raw.column_names)}",
            )
    return columns


def _convert(raw: Dataset, row_format: Format, source: str, margin: list[str], keep_others: bool) -> Rows:
    """Rows in a trainer's form, with the columns that the format does not know if they are to be kept."""
    margin = margin if row_format.kind == "preferences" else []
    columns = _columns(raw, row_format, source, margin)
    others = {name: kind for name, kind in raw.features.items() if keep_others and name not in columns}
    converted = raw.map(
        _convert_row,
        fn_kwargs={
            "convert": row_format.convert,
            "columns": {k: v == _MESSAGES for k, v in columns.items()},
            "margin": margin,
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
    return Rows(kept, row_format, Ledger(source, row_format.name, len(raw), len(kept), skipped), numbers)


def _convert_row(row: dict[str, Any], convert: Any, columns: dict[str, bool], margin: list[str]) -> dict[str, Any]:
    """One converted row, or the reason why not and empty columns. `columns` says which columns hold messages."""
    try:
        if any(value is None for value in row.values()):
            row = {key: value for key, value in row.items() if value is not None}
        converted = convert(row)
        if margin:
            converted["margin"] = _difference(row, margin)
        for column, messages in columns.items():
            if is_messages(converted.get(column)) != messages:
                raise BadRow(f"`{column}` is {'text' if messages else 'messages'}, unlike in the first row")
        return {_REASON: None, **converted}
    except KeyError as error:
        reason = f"the column {error} is missing or empty"
    except BadRow as error:
        reason = str(error)
    return {_REASON: reason} | dict.fromkeys(columns)


def _difference(row: dict[str, Any], columns: list[str]) -> float:
    """The first column's number, less the second's where there is one; 0 where there is none."""
    try:
        better, *worse = (float(row.get(column, 0.0)) for column in columns)
    except (TypeError, ValueError) as error:
        raise BadRow(f"the margin is not a number: {error}") from error
    return better - sum(worse)


def _columns(raw: Dataset, row_format: Format, source: str, margin: list[str]) -> dict[str, Any]:
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
        types = {key: _type(value) for key, value in converted.items()}
        return types | ({"margin": Value("float32")} if margin else {})
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
