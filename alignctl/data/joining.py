"""Rows of several sources as rows of one, and how many each has. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from alignctl.data.converting import RICH_MESSAGES, holds_messages
from alignctl.data.formats import Format
from alignctl.data.places import Places
from alignctl.data.recast import as_kind, as_rich_messages
from alignctl.data.rows import Ledger, Part, Rows
from alignctl.data.token_columns import TEXTS
from alignctl.errors import RequestError


def form_of(rows: Rows) -> set[str]:
    """The columns of texts, with those that are messages though they might be text."""
    kinds = {name: kind for name, kind in rows.dataset.features.items() if name in TEXTS}
    return {
        f"{name} as messages" if holds_messages(kind) and name != "messages" else name for name, kind in kinds.items()
    }


def join(sources: Sequence[Rows], kind: str, names: Sequence[str | None], weights: Sequence[float] | None) -> Rows:
    """Rows one source behind another. Their numbers are counted through all sources.

    Args:
        kind: What is needed of the rows. Rows that are of several kinds are made rows of it.
        names: What each source is called, where they are measured on by name.
        weights: What share of a mixture each is to have; None where nothing was said.

    Raises:
        RequestError: Rows of one source cannot stand beside those of another.
    """
    if len({rows.format.kind for rows in sources}) > 1 and kind != "prompts":
        sources = [rows if rows.format.kind == kind else _as_kind(rows, kind) for rows in sources]
    _check_forms(sources, kind, of_mixture=not any(names))
    if any(RICH_MESSAGES in rows.dataset.features.values() for rows in sources):
        sources = [as_rich_messages(rows) for rows in sources]
    ledgers = [rows.ledger for rows in sources]
    reads = [ledger.read for ledger in ledgers]
    before = np.cumsum([0, *reads])[:-1].tolist()
    numbers = [first + number for first, rows in zip(before, sources, strict=True) for number in rows.numbers]
    columns = list(dict.fromkeys(column for rows in sources for column in rows.columns))
    try:
        dataset = concatenate_datasets([_with_columns(rows, columns) for rows in sources])
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise RequestError(
            f"the rows of {', '.join(ledger.source for ledger in ledgers)} cannot stand together: "
            f"{' '.join(str(error).split())}",
            "give a column values of one type in all of them, or take it out",
        ) from error
    shown = [ledger.source for ledger in ledgers]
    parts = [
        Part(ledger.source, ledger.format, ledger.read, name=name, weight=weight, agreement=ledger.agreement)
        for ledger, name, weight in zip(ledgers, names, weights or [None] * len(ledgers), strict=True)
    ]
    ledger = Ledger(
        source=", ".join(dict.fromkeys(shown)),
        format=", ".join(dict.fromkeys(ledger.format for ledger in ledgers)),
        read=sum(reads),
        kept=sum(ledger.kept for ledger in ledgers),
        skipped=_renumbered([ledger.skipped for ledger in ledgers], before),
        unused=sorted({name for ledger in ledgers for name in ledger.unused}),
        partly=_renumbered([ledger.partly for ledger in ledgers], before),
        parts=parts,
        ties=[first + number for first, own in zip(before, ledgers, strict=True) for number in own.ties],
    )
    joined = Rows(dataset, _joint([rows.format for rows in sources]), ledger, numbers, tuple(columns), _places(sources))
    return replace(joined, ledger=counted(ledger, np.asarray(numbers)))


def counted(ledger: Ledger, numbers: np.ndarray, tokens: np.ndarray | None = None) -> Ledger:
    """A ledger with what each source has of some rows.

    Args:
        numbers: Of the rows, int64 `[rows]`, counted through all sources.
        tokens: Of each row, int64 `[rows]`, where shares are shares of tokens.
    """
    if not ledger.parts:
        return ledger
    part = part_of(ledger, numbers)
    sums = [np.bincount(part, weights, minlength=len(ledger.parts)).astype(int).tolist() for weights in (None, tokens)]
    of = sums[1] if tokens is not None else sums[0]
    parts = [
        replace(each, rows=sums[0][i], tokens=of[i] if tokens is not None else None, share=of[i] / max(1, sum(of)))
        for i, each in enumerate(ledger.parts)
    ]
    return replace(ledger, parts=parts)


def part_of(ledger: Ledger, numbers: np.ndarray) -> np.ndarray:
    """Which of the sources each of some rows is from: int64 `[rows]`."""
    return np.searchsorted(np.cumsum([part.read for part in ledger.parts]), numbers, side="left")


def _as_kind(rows: Rows, kind: str) -> Rows:
    made = as_kind(rows, kind)
    return replace(made, format=replace(made.format, kind=kind))


_ANSWERS = {"prompt as messages", "completion as messages"}
"""The form of rows of which the last answer alone is trained on."""


def _check_forms(sources: Sequence[Rows], kind: str, of_mixture: bool) -> None:
    def of(rows: Rows) -> set[str]:
        return {name for name in form_of(rows) if kind != "prompts" or name.startswith("prompt")}

    for rows in sources[1:]:
        if of(rows) != of(sources[0]):
            forms = {source.ledger.source: of(source) for source in (sources[0], rows)}
            whole = next((source for source, form in forms.items() if form == {"messages"}), None)
            answers = next((source for source, form in forms.items() if form == _ANSWERS), None)
            if whole and answers:
                raise RequestError(
                    f"{whole} has whole conversations, of which every turn is trained on (with `assistant_only_loss` "
                    f"every answer), and {answers} prompts and completions, of which completions alone are",
                    f"`format: weighed_messages` in the entry of {whole} makes each answer a completion, and what is "
                    "before it its prompt" if of_mixture else "give all of them in one of these forms",
                )  # fmt: skip
            first, other = (f"{each.ledger.source} ({', '.join(sorted(of(each)))})" for each in (sources[0], rows))
            raise RequestError(
                f"the rows of {other} have another form than those of {first}: they cannot stand together",
                "write all of them as messages, or all of them as text",
            )


def _with_columns(rows: Rows, columns: Sequence) -> Dataset:
    """Rows with all of some columns that a method declares; those that they have not are empty, or what is to stand
    where a row has no value.

    Raises:
        RequestError: A row has to have a value.
    """
    dataset, own = rows.dataset, {column.name for column in rows.columns}
    for column in columns:
        if column.name in own or column.name in dataset.column_names:
            continue
        if column.number and column.missing is None:
            raise RequestError(
                f"other rows have the column `{column.name}`, and those of {rows.ledger.source} do not",
                "add it, or take it out of the others",
            )
        if column.number:
            dataset = dataset.add_column(column.name, pa.array([column.missing] * len(dataset), pa.float32()))
    return dataset


def _joint(formats: Sequence[Format]) -> Format:
    """A format for rows of several."""
    first = formats[0]
    if all(each == first for each in formats):
        return first
    ways = {each.as_text for each in formats}
    name = ", ".join(dict.fromkeys(each.name for each in formats))
    return replace(first, name=name, as_text=ways.pop() if len(ways) == 1 else None)


def _renumbered(reasons: Sequence[dict[int, str]], before: Sequence[int]) -> dict[int, str]:
    return {first + number: why for first, own in zip(before, reasons, strict=True) for number, why in own.items()}


def _places(sources: Sequence[Rows]) -> Places:
    files: list[str] = []
    where = []
    for rows in sources:
        own = np.full((rows.ledger.read, 2), -1, np.int64)
        own[: len(rows.places.where)] = rows.places.where
        own[:, 0] += np.where(own[:, 0] >= 0, len(files), 0)
        files += rows.places.files
        where.append(own)
    return Places(files, np.concatenate(where))
