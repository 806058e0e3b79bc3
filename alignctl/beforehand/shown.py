"""Rows as the trainer of a stage sees them: which tokens are trained on, which are context, which are cut.

Ids and masks are what the trainer's own collator makes of a row, once as the stage sets it and once with nothing cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignctl.beforehand.looking import Line, Ready
from alignctl.data.converting import MARGIN
from alignctl.data.scanning import lengths
from alignctl.errors import RequestError
from alignctl.stage.ledger import about_lengths, ledger
from alignctl.stage.lengths import check_lengths
from alignctl.stage.rows import check_skipped
from alignctl.trainers.base.columns import ROW_NUMBER
from alignctl.trainers.base.managed import StageTrainer

TRAINED, CONTEXT, CUT = "trained", "context", "cut"
_SIDES = {1: ("row",), 2: ("chosen", "rejected")}
_IGNORED = -100  # among labels
_IDS = "_ids"


@dataclass(frozen=True)
class Asked:
    """Which rows are to be shown."""

    row: int | None
    """This one of the data, counted from 1."""
    worst: Literal["length", "margin"] | None
    """The longest, or those whose chosen completion is better by least."""
    count: int
    """At most so many."""
    max_skipped: float | None = None
    """What `data.max_skipped` is where rows are trained on, if the rows that are shown may all be skipped but one."""


def preview(line: Line, name: str, asked: Asked) -> dict[str, Any]:
    """What is shown of the rows of a stage, as JSON takes it.

    Raises:
        RequestError: There is no such row, or nothing to order rows by.
        AlignctlError: The stage would refuse its rows.
    """
    apart = {"packing": False}  # of which there would be no rows left
    cut = line.ready(name, **apart)
    if cut is None:
        raise RequestError(f"the rows of `{name}`, or the tokenizer they are read with, are still to be made")
    cuts = getattr(cut.trainer.args, "max_length", None) is not None
    whole = line.ready(name, **apart, max_length=None) if cuts else cut
    assert whole is not None
    numbers = _numbers(whole, asked)
    shown = {number: row for number, row in _rows(cut.trainer, numbers)}
    return {
        "rows": ledger(cut.rows, cut.trainer.lengths_of["train"]),
        "notices": cut.said,
        "refused": _refused(cut, asked.max_skipped),
        "shown": [
            {"row": number, "sequences": _sequences(cut.trainer, shown.get(number), whole.trainer, row)}
            | {column: row[column] for column in cut.trainer.row_columns if column in row}
            for number, row in _rows(whole.trainer, numbers)
        ],
    }


def _refused(ready: Ready, max_skipped: float | None) -> list[dict[str, Any]]:
    """Why a run would refuse the rows, as JSON takes it."""
    stage, found = ready.job.stage, []
    if max_skipped is not None:
        stage = replace(stage, data=replace(stage.data, max_skipped=max_skipped))
    for check, about in (
        (check_skipped, (ready.rows, stage)),
        (check_lengths, about_lengths(ready.job, ready.trainer)),
    ):
        try:
            check(*about)
        except RequestError as error:
            found += error.told()
    return found


def _numbers(ready: Ready, asked: Asked) -> list[int]:
    """Numbers in the data of the rows that are shown, in the order in which they are."""
    there = ready.trainer.train_dataset
    numbers = there[ROW_NUMBER][:] if asked.worst is None else []
    if asked.row is not None:
        if asked.row not in numbers:
            raise _not_there(ready, asked.row)
        return [asked.row]
    if asked.worst is None:
        return sorted(dict.fromkeys(numbers))[: asked.count]
    if asked.worst == "length":
        keys = -lengths(there.select_columns([name for name in there.column_names if name.endswith(_IDS)]))
    elif MARGIN in there.column_names:
        keys = np.asarray(there[MARGIN][:])
    else:
        raise RequestError(
            f"`--worst margin`: the rows of {ready.rows.ledger.source} have no margins for `{ready.job.stage.method}`",
            "methods that take margins, as `reward` does, read the column `margin`, or what `data.margin` names",
        )
    places = np.argsort(keys, kind="stable")[: asked.count].tolist()
    return list(dict.fromkeys(there[place][ROW_NUMBER] for place in places))


def _not_there(ready: Ready, row: int) -> RequestError:
    of = ready.rows.ledger
    if row in of.skipped:
        return RequestError(f"row {row:,} of {of.source} cannot be used: {of.skipped[row]}")
    if row in of.ties:
        return RequestError(f"row {row:,} of {of.source} is left out: no completion is better than another")
    if not 0 < row <= of.read:
        return RequestError(f"there is no row {row:,}: {of.source} has {of.read:,}")
    return RequestError(f"row {row:,} of {of.source} is held out, or nothing of it is left to train on")


def _rows(trainer: StageTrainer, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of some numbers, in their order; of one number all that were made of it."""
    found = np.asarray(trainer.train_dataset[ROW_NUMBER][:])
    for number in numbers:
        for place in np.flatnonzero(found == number).tolist():
            yield number, trainer.train_dataset[place]


def _sequences(
    trainer: StageTrainer, row: dict[str, Any] | None, without_limit: StageTrainer, whole: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each sequence of a row in parts, each of one state.

    Args:
        row: As it is trained on; None where it is not.
        whole: With nothing cut.
    """
    full = _collated(without_limit, whole)
    kept = _collated(trainer, row) if row else [([], [])] * len(full)
    tokenizer, shown = trainer.processing_class, []
    for name, (ids, states), (left, left_states) in zip(_SIDES[len(full)], full, kept, strict=True):
        before = 0 if ids[: len(left)] == left else len(ids) - len(left)
        after = len(ids) - before - len(left)
        states = [CUT] * before + left_states + [CUT] * after
        shown.append(
            {"name": name}
            | {state: states.count(state) for state in (CONTEXT, TRAINED, CUT)}
            | {"parts": _parts(tokenizer, ids, states)}
        )
    return shown


def _collated(trainer: StageTrainer, row: dict[str, Any]) -> list[tuple[list[int], list[str]]]:
    """Ids of each sequence of a row as the trainer's collator makes it, and the state of each token. Nothing is trained
    on where prompts are drawn to; a reward model is trained on what it says at the last token."""
    batch = trainer.data_collator([row])
    if "input_ids" not in batch:
        return [(ids, [CONTEXT] * len(ids)) for ids in batch["prompt_ids"]]
    sequences = []
    for place, ids in enumerate(batch["input_ids"].tolist()):
        count = int(batch["attention_mask"][place].sum()) if "attention_mask" in batch else len(ids)
        if "labels" in batch:
            marks = (batch["labels"][place] != _IGNORED).tolist()
        elif "completion_mask" in batch:
            marks = batch["completion_mask"][place].bool().tolist()
        else:
            marks = [at == count - 1 for at in range(count)]
        marks[0] = False  # it follows nothing, so it cannot be predicted
        sequences.append((ids[:count], [TRAINED if mark else CONTEXT for mark in marks[:count]]))
    return sequences


def _parts(tokenizer: PreTrainedTokenizerBase, ids: list[int], states: list[str]) -> list[dict[str, Any]]:
    """Runs of tokens of one state. What a part says is what it adds to those before it: some tokenizers write no space
    before the first token of all."""
    parts, at, before = [], 0, ""
    for state, group in groupby(states):
        end = at + len(list(group))
        text = tokenizer.decode(ids[:end])
        added = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[at:end])
        parts.append({"state": state, "text": added, "ids": ids[at:end]})
        at, before = end, text
    return parts
