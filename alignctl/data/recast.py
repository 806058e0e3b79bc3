"""Rows of one kind or form as rows of another: pairs as labelled completions, messages as plain text. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, Value

from alignctl.data.converters import unpair
from alignctl.data.converting import AT_ONCE, MESSAGES, RICH_MESSAGES, holds_messages
from alignctl.data.kept import kept, read_rows, write_rows
from alignctl.data.messages import is_messages
from alignctl.data.rows import Rows
from alignctl.errors import RequestError


def as_kind(rows: Rows, kind: str) -> Rows:
    """Rows as another kind that can be made of them (see data/formats.py).

    Raises:
        RequestError: They are no rows of that kind.
    """
    if kind == "feedback":
        return _unpaired(rows)
    if "tools" in rows.dataset.column_names:
        raise RequestError(
            f"the rows of {rows.ledger.source} have tools, and completions are drawn to prompts without",
            "take `tools` out of the rows, or train on their completions with another method",
        )
    if "prompt" not in rows.dataset.column_names:
        raise RequestError(
            f"the rows of {rows.ledger.source} are whole conversations or texts: there are no prompts to answer",
            "give rows with a column `prompt`",
        )
    return rows


def _unpaired(rows: Rows) -> Rows:
    """Preferences as feedback: each completion of a pair by itself, with what else the pair has."""
    features, own = dict(rows.dataset.features), [column.name for column in rows.columns]
    own += [name for name in ("tools",) if name in features]
    features = {name: features[name] for name in own} | {
        "prompt": features["prompt"], "completion": features["chosen"], "label": Value("bool"),
    }  # fmt: skip
    pairs = rows.dataset

    def make(folder: Path) -> None:
        batches = (_unpair_batch(batch, own) for batch in pairs.iter(AT_ONCE))
        write_rows(folder / "single.arrow", Features(features), batches)

    folder = kept(["unpaired", pairs._fingerprint, own], make, pairs)
    numbers = [number for number in rows.numbers for _ in range(2)]
    return replace(rows, dataset=read_rows(folder / "single.arrow"), numbers=numbers)


def _unpair_batch(batch: dict[str, list[Any]], own: list[str]) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    singles = [{name: row[name] for name in own} | single for row in rows for single in unpair(row)]
    return {column: [single[column] for single in singles] for column in ("prompt", "completion", "label", *own)}


def as_rich_messages(rows: Rows) -> Rows:
    """Rows that can stand beside others whose messages have more than role and content."""
    bare = rows.dataset
    features = {name: RICH_MESSAGES if kind == MESSAGES else kind for name, kind in bare.features.items()}
    if features == bare.features:
        return rows

    def make(folder: Path) -> None:
        write_rows(folder / "rich.arrow", Features(features), bare.iter(AT_ONCE))

    folder = kept(["rich messages", bare._fingerprint], make, bare)
    return replace(rows, dataset=read_rows(folder / "rich.arrow"))


def as_plain_text(rows: Rows, where: str) -> Rows:
    """Rows for a tokenizer without chat template: messages written as the format's customary plain text.

    Raises:
        RequestError: The format has no such form.
    """
    first = rows.dataset[0]
    if not any(is_messages(value) for value in first.values()):
        return rows
    plain = [not holds_messages(kind) or kind == MESSAGES for kind in rows.dataset.features.values()]
    if rows.format.as_text is None or not all(plain) or "tools" in first:
        raise RequestError(
            f"the rows of {rows.ledger.source} are conversations, but the tokenizer of {where} has no chat template",
            "give one with `model.chat_template=FILE` (Jinja), or start from a chat model",
        )
    messages = rows.dataset
    features = {name: Value("string") if kind == MESSAGES else kind for name, kind in messages.features.items()}

    def make(folder: Path) -> None:
        batches = (_plain_text_batch(batch, rows.format.as_text) for batch in messages.iter(AT_ONCE))
        write_rows(folder / "plain.arrow", Features(features), batches)

    folder = kept(["plain text", messages._fingerprint, rows.format.name], make, messages)
    return replace(rows, dataset=read_rows(folder / "plain.arrow"))


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
