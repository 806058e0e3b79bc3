"""All rows of a section `data`: of one source or a mixture of several, and what is held out. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from alignctl.data.converting import MARGIN, read_numbered, write_numbered
from alignctl.data.holding_out import held_out, rows_wanted, shared_prompts
from alignctl.data.joining import counted, join, part_of
from alignctl.data.kept import kept
from alignctl.data.mixing import mixture
from alignctl.data.reading import check_columns, read_split
from alignctl.data.rows import Rows
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError
from alignctl.methods.registry import RowColumn

_OF_ONE = {
    "mix": None, "mix_by": "rows", "mix_stopping_strategy": "first_exhausted", "eval": None, "eval_path": None,
    "eval_split": None, "eval_rows": 0, "eval_limit": None,
}  # fmt: skip
"""What is said of a source that is read by itself, so that others who read it find what was made."""

CountTokens = Callable[[Dataset], np.ndarray]
"""Tokens of each row: int64 `[rows]`."""


def read_section(
    settings: DataSettings,
    kind: str,
    seed: int,
    columns: tuple[RowColumn, ...] = (),
    count: Callable[[int], None] = lambda rows: None,
    count_tokens: CountTokens | None = None,
    count_bytes: Callable[[int], None] = lambda more: None,
) -> tuple[Rows, Rows | None]:
    """As `read_split`, of a mixture too: its held-out rows are of all its sources, by their weights, and none of their
    prompts is in any of them. Named sets of held-out rows are one behind another.

    Args:
        count_tokens: Is asked where a mixture is by tokens.
    """
    if settings.mix is None and settings.eval is None:
        return read_split(settings, kind, seed, columns, count, count_bytes)

    def read(beside: tuple[RowColumn, ...], **own: Any) -> Rows:
        return read_split(replace(settings, **_OF_ONE | own), kind, seed, beside, count, count_bytes)[0]

    given = None
    others = tuple(column for column in columns if column.name != MARGIN)
    if settings.eval:
        sets = [read(others, path=path, split="train", limit=settings.eval_limit) for path in settings.eval.values()]
        given = join(sets, kind, list(settings.eval), None)
    elif settings.eval_path:
        given = read(others, path=settings.eval_path, split="train", limit=settings.eval_limit)
    if settings.mix is None:
        train = read(columns)
        return train, _looked_at(given, train, others)
    sources = [
        read(columns, **{"limit": None} | {key: value for key, value in entry.items() if key != "weight"})
        for entry in settings.mix
    ]
    weights = [entry.get("weight") for entry in settings.mix]
    joined = join(sources, kind, [None] * len(sources), None if None in weights else weights)
    train, held = _mixed(joined, settings, seed, given is None, count_tokens)
    return train, held if given is None else _looked_at(given, train, others)


def _looked_at(held: Rows, train: Rows, columns: tuple[RowColumn, ...]) -> Rows:
    """Held-out rows that are given, with how many of them have a prompt that is trained on.

    Args:
        columns: What a method looks at in both.
    """
    check_columns(train, held, columns)

    def make(folder: Path) -> None:
        shared = shared_prompts([train.dataset], held.dataset)
        (folder / "shared.json").write_text(json.dumps(shared), encoding="utf-8")

    folder = kept(["shared prompts", train.dataset._fingerprint, held.dataset._fingerprint], make, held.dataset)
    shared = json.loads((folder / "shared.json").read_text(encoding="utf-8"))
    return replace(held, ledger=replace(held.ledger, shared_prompts=shared))


def _mixed(
    joined: Rows, settings: DataSettings, seed: int, holds_out: bool, count_tokens: CountTokens | None
) -> tuple[Rows, Rows | None]:
    """A mixture of joined rows, and the rows held out of it.

    Raises:
        RequestError: All rows of a source are held out.
    """
    numbers, parts = np.asarray(joined.numbers), joined.ledger.parts
    weights = None if parts[0].weight is None else [part.weight for part in parts]
    by_tokens = settings.mix_by == "tokens"
    assert count_tokens is not None or not by_tokens
    tokens = count_tokens(joined.dataset) if by_tokens else None

    def make(folder: Path) -> None:
        part = part_of(joined.ledger, numbers)
        own = [np.flatnonzero(part == i) for i in range(len(parts))]
        held = [np.zeros(len(rows), bool) for rows in own]
        if holds_out:
            sources = [joined.dataset.select(range(rows[0], rows[-1] + 1)) for rows in own]
            shares = np.array([len(rows) for rows in own] if weights is None else weights, float)
            whole = rows_wanted(settings.eval_rows, len(numbers)) * shares / shares.sum()
            wanted = [min(round(most), len(rows) // 5) for most, rows in zip(whole, own, strict=True)]
            held = held_out(sources, [numbers[rows].tolist() for rows in own], wanted, seed)
        left = [rows[~is_held] for rows, is_held in zip(own, held, strict=True)]
        for each, rows in zip(parts, left, strict=True):
            if not len(rows):
                raise RequestError(f"all rows of {each.source} are held out", "give more rows, or `data.eval_rows=0`")
        sizes = [np.ones(len(rows), np.int64) if tokens is None else tokens[rows] for rows in left]
        # What was made of one row of a file stays together.
        starts = [np.diff(numbers[rows], prepend=0) != 0 for rows in left]
        chosen = mixture(sizes, weights, settings.mix_stopping_strategy, seed, settings.limit, starts)
        chosen = np.concatenate(left)[chosen]
        write_numbered(joined.dataset, numbers, chosen, folder / "train.arrow")
        out = np.concatenate([rows[is_held] for rows, is_held in zip(own, held, strict=True)])
        if len(out):
            write_numbered(joined.dataset, numbers, out, folder / "eval.arrow")
        facts = {"held_out": len(set(numbers[out].tolist()))}
        if tokens is not None:
            np.save(folder / "tokens.npy", tokens[chosen])
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    told = [weights, settings.mix_by, settings.mix_stopping_strategy, settings.limit, settings.eval_rows, seed]
    told += [
        joined.dataset._fingerprint,
        holds_out,
        tokens is not None and hashlib.sha256(tokens.tobytes()).hexdigest(),
    ]
    folder = kept(["mixed", *told], make, joined.ledger.source)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    sizes = np.load(folder / "tokens.npy") if tokens is not None else None
    train = _numbered(joined, folder / "train.arrow", sizes)
    left_over = joined.ledger.kept - train.ledger.kept - facts["held_out"]
    train = replace(train, ledger=replace(train.ledger, held_out=facts["held_out"], left_over=left_over))
    if not (folder / "eval.arrow").exists():
        return train, None
    held = _numbered(joined, folder / "eval.arrow", None)
    return train, replace(held, ledger=replace(held.ledger, read=held.ledger.kept, skipped={}, partly={}, ties=[]))


def _numbered(joined: Rows, file: Path, tokens: np.ndarray | None) -> Rows:
    """Some of joined rows, from a file."""
    dataset, numbers = read_numbered(file)
    ledger = counted(joined.ledger, np.asarray(numbers), tokens)
    return replace(joined, dataset=dataset, numbers=numbers, ledger=replace(ledger, kept=len(set(numbers))))
