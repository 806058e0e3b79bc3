"""Reads rows from a file, the Hub or a built-in world and turns them into a trainer's rows, with a ledger of losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from alignctl.data.converting import MARGIN, Beside, convert, places_beside, rows_of
from alignctl.data.files import Row
from alignctl.data.formats import FORMATS, imitating_chosen
from alignctl.data.holding_out import held_out, rows_wanted, shared_prompts
from alignctl.data.kept import kept, write_some
from alignctl.data.mapping import how_to_read
from alignctl.data.places import Place
from alignctl.data.raw import RawRows, Source, check_unchanged, load_raw
from alignctl.data.rows import Ledger, Rows
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, shown
from alignctl.data.trees import gathered, is_message_of_tree
from alignctl.errors import RequestError
from alignctl.methods.registry import RowColumn

_SHOWN_BAD_ROWS = 5
_DETECT_ROWS = 20
_ROWS = ".arrow"


def read_split(
    settings: DataSettings,
    kind: str,
    seed: int,
    columns: tuple[RowColumn, ...] = (),
    count: Callable[[int], None] = lambda rows: None,
    count_bytes: Callable[[int], None] = lambda more: None,
) -> tuple[Rows, Rows | None]:
    """Reads training rows and held-out rows, with those of the columns that the data has.

    Held-out rows come from `eval_path` or `eval_split`, else they are taken out of the training rows, whole prompts at
    a time, so that no prompt is on both sides. One process does it, and those that ask for the same take what it made.

    Args:
        count: Is told of more rows that were read, as it goes.
        count_bytes: Is told of more bytes that were fetched, as it goes.

    Raises:
        RequestError: A source cannot be read, has no rows of this kind, or has bad rows and `on_bad_row` is fail.
    """
    sources = [Source(shown(settings.path), settings.path, settings.split, "train", settings.limit)]
    if settings.eval_path or settings.eval_split or settings.path in BUILTIN_SOURCES:
        path, split = settings.eval_path or settings.path, settings.eval_split or "train"
        sources.append(Source(shown(path), path, split, "test", settings.eval_limit))
    raw = [load_raw(settings, source, kind, count_bytes) for source in sources]
    told = [asdict(settings), [asdict(column) for column in columns]]

    def make(folder: Path) -> None:
        name = "read" if len(sources) == 1 else "train"
        named = {column.name for column in columns}
        train = _read(raw[0], settings, kind, columns, named, folder / f"{name}{_ROWS}", count)
        if len(sources) == 1:
            check_unchanged(raw[0])
            _hold_out(train, settings, seed, folder)
            return
        # `data.margin` is said of the training rows; others are measured without margins.
        others = tuple(column for column in columns if column.name != MARGIN)
        held = _read(raw[1], settings, kind, others, named, folder / f"eval{_ROWS}", count)
        for rows in raw:
            check_unchanged(rows)
        check_columns(train, held, others)
        _describe(train, folder, "train", of="train")
        if settings.path not in BUILTIN_SOURCES:
            shared = shared_prompts([train.dataset], held.dataset)
            held = replace(held, ledger=replace(held.ledger, shared_prompts=shared))
        _describe(held, folder, "eval", of="eval")

    folder = kept(["rows", kind, seed, *told, [rows.content for rows in raw]], make, sources[0].path)
    return _described(folder, "train"), _described(folder, "eval")


def check_columns(train: Rows, held: Rows, columns: tuple[RowColumn, ...]) -> None:
    """
    Raises:
        RequestError: Held-out rows lack a column of training rows that a method looks at in both.
    """
    for column in columns:
        if column in train.columns and column not in held.columns:
            raise RequestError(
                f"the training rows have the column `{column.name}`, and the held-out rows of {held.ledger.source} "
                "do not",
                "add it, or take it out of both",
            )


def _read(
    raw: RawRows,
    settings: DataSettings,
    kind: str,
    columns: tuple[RowColumn, ...],
    named: Collection[str],
    file: Path,
    count: Callable[[int], None],
) -> Rows:
    """The rows of a source, in a file. `named` are the columns that the method looks at, here or in other rows."""
    path = raw.source.path
    if is_message_of_tree(next(iter(raw), {})):
        raw = replace(raw, each=partial(_trees, raw.each))
    first = list(islice(raw, _DETECT_ROWS))
    if not first:
        raise RequestError(f"{path} has no rows")
    try:
        reading = how_to_read(first, kind, settings.format, settings.use, settings.columns, settings.template, named)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error
    beside = Beside.of(raw, reading, columns, settings.margin)
    rows = convert(raw, reading, beside, settings, kind, file, count)
    if rows.ledger.skipped and settings.on_bad_row == "fail":
        raise RequestError(f"{path}: {describe_skipped(rows)}", "mend or remove them, or set `data.on_bad_row=skip`")
    if rows.ledger.kept == 0:
        raise RequestError(f"{path}: no row can be used: {describe_skipped(rows)}")
    return rows


def _trees(messages: Callable[[], Iterator[tuple[Place | None, Row]]]) -> Iterator[tuple[Place | None, Row]]:
    return gathered(messages())


def _describe(rows: Rows, folder: Path, part: str, of: str) -> None:
    """Writes what is to be known of a file of rows beside them. `of` is the file that was read first, whose rows have
    the places."""
    facts = {
        "format": rows.format.name,
        "kind": rows.format.kind,
        "ledger": asdict(rows.ledger),
        "columns": [asdict(column) for column in rows.columns],
        "files": rows.places.files,
        "of": of,
    }
    (folder / f"{part}.json").write_text(json.dumps(facts), encoding="utf-8")


def _described(folder: Path, part: str) -> Rows | None:
    """Rows as they were written, or None where there are none."""
    file = folder / f"{part}.json"
    if not file.exists():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    row_format = FORMATS[facts["format"]]
    if row_format.kind != facts["kind"]:
        row_format = imitating_chosen(row_format)
    ledger = facts["ledger"]
    by_number = {
        name: {int(number): reason for number, reason in ledger[name].items()} for name in ("skipped", "partly")
    }
    return rows_of(
        folder / f"{part}{_ROWS}",
        row_format,
        Ledger(**ledger | by_number),
        tuple(RowColumn(**column) for column in facts["columns"]),
        facts["files"],
        places_beside(folder / f"{facts['of']}{_ROWS}"),
    )


def describe_skipped(rows: Rows) -> str:
    """Names the first skipped rows with their reasons."""
    ledger, places = rows.ledger, rows.places
    first = list(ledger.skipped.items())[:_SHOWN_BAD_ROWS]
    shown = [f"row {places.shown(number)}: {reason}" for number, reason in first]
    more = f"; and {len(ledger.skipped) - len(shown)} more" if len(ledger.skipped) > len(shown) else ""
    return f"{len(ledger.skipped)} of {ledger.read} rows cannot be used ({'; '.join(shown)}{more})"


def _hold_out(rows: Rows, settings: DataSettings, seed: int, folder: Path) -> None:
    """Splits off the rows that are held out; writes and describes both parts."""
    (is_held,) = held_out([rows.dataset], [rows.numbers], [rows_wanted(settings.eval_rows, len(rows.dataset))], seed)
    file = folder / f"read{_ROWS}"
    if not is_held.any():
        file.rename(folder / f"train{_ROWS}")
        _describe(rows, folder, "train", of="read")
        return
    numbers = np.asarray(rows.numbers)
    left, out = np.unique(numbers[~is_held]), np.unique(numbers[is_held])
    ledgers = {
        "train": replace(rows.ledger, kept=len(left), held_out=len(np.setdiff1d(out, left))),
        "eval": replace(rows.ledger, read=len(out), kept=len(out), skipped={}, ties=[], agreement=None),
    }
    for part, chosen in (("train", ~is_held), ("eval", is_held)):
        write_some(file, folder / f"{part}{_ROWS}", chosen)
        _describe(replace(rows, ledger=ledgers[part]), folder, part, of="read")
    file.unlink()
