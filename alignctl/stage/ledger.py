"""What became of the rows of a stage: read, kept, cut, lost, skipped, why, and where they stand. Used by run.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset

from alignctl.config.stages import StageConfig
from alignctl.data.joining import counted
from alignctl.data.lengths import RowLengths, table
from alignctl.data.places import Places
from alignctl.data.rows import Ledger, Rows
from alignctl.data.scanning import lengths as lengths_of_rows
from alignctl.models.loading import longest_seen
from alignctl.run.files import write_json
from alignctl.stage.job import Job
from alignctl.stage.lengths import check_lengths, said_of_cut
from alignctl.trainers.base.columns import ROW_NUMBER
from alignctl.trainers.base.managed import StageTrainer

_ROWS = 100  # that are named of each reason
_REASONS = 100  # that are told apart


def write_ledgers(job: Job, trainer: StageTrainer, rows: Rows, held_rows: Rows | None) -> None:
    """Writes down what became of all rows, and says how many are cut.

    Raises:
        RequestError: Too many of the training rows are lost, or cut.
    """
    parts = {"train": (rows, trainer.train_dataset), "eval": (held_rows, trainer.eval_dataset)}
    if trainer.is_world_process_zero():
        ledgers = {
            part: ledger(some, trainer.lengths_of.get(part)) | _shares(some.ledger, used)
            for part, (some, used) in parts.items()
            if some is not None
        }
        write_json(job.paths.data, ledgers)
    about = about_lengths(job, trainer)
    check_lengths(*about)
    if said := said_of_cut(*about):
        job.progress.notice(said)


def about_lengths(job: Job, trainer: StageTrainer) -> tuple[RowLengths, StageConfig, str, int | None]:
    """What stage/lengths.py looks at."""
    args = trainer.args
    field = "max_length" if hasattr(args, "max_length") else "max_prompt_length"
    seen = longest_seen(trainer.trained_model)
    return trainer.lengths_of["train"], job.stage, field, seen and seen - getattr(args, "response_length", 0)


def ledger(rows: Rows, lengths: RowLengths | None) -> dict[str, Any]:
    """What became of the rows of a source: those kept, lost, skipped, tied and held out are all that were read.

    A row that gives several is kept if any of these is, and `partly` counts those of which others are not.

    Args:
        lengths: Of the rows; None where nothing was made of them.
    """
    numbers = _numbers(rows, lengths)
    none = np.zeros(len(numbers), bool)
    is_lost, is_cut = (none, none) if lengths is None else (lengths.lost, lengths.cut)
    there, cut = np.unique(numbers[~is_lost]), np.unique(numbers[is_cut])
    lost, in_part = lost_rows(rows, lengths)
    partly = rows.ledger.partly | in_part
    skipped, places = rows.ledger.skipped, rows.places
    named = {"skipped": skipped, "lost": lost, "partly": partly}
    reasons = [one for what, why_of in named.items() for one in _reasons(what, why_of, places)]
    if ties := rows.ledger.ties:
        reasons.append(_reason("ties", "no completion is better than another", ties, places))
    if len(cut):
        reasons.append(_reason("cut", f"longer than {lengths.limit} tokens", cut.tolist(), places))
    shown = sorted(row["row"] for one in reasons if one["what"] == "skipped" for row in one["first"])
    return {
        "source": rows.ledger.source,
        "format": rows.ledger.format,
        "read": rows.ledger.read,
        "kept": len(there),
        "held_out": rows.ledger.held_out,
        "shared_prompts": rows.ledger.shared_prompts,
        "lost": len(lost),
        "skipped": {number: skipped[number] for number in shown},
        "num_skipped": len(skipped),
        "ties": len(ties),
        "agreement": rows.ledger.agreement,
        "partly": len(partly),
        "cut": len(cut),
        "trainer_rows": int((~is_lost).sum()),
        "lengths": table(lengths) if lengths else None,
        "unused": rows.ledger.unused,
        "reasons": reasons,
    }


def lost_rows(rows: Rows, lengths: RowLengths | None) -> tuple[dict[int, str], dict[int, str]]:
    """Numbers of the rows of which all is lost, and of those of which something is, with the reason.

    Args:
        lengths: As for `ledger`.
    """
    if lengths is None:
        return {}, {}
    numbers, is_lost = _numbers(rows, lengths), lengths.lost
    why = {int(numbers[i]): lengths.why(i) for i in is_lost.nonzero()[0].tolist()}
    in_part = set(np.intersect1d(numbers[is_lost], numbers[~is_lost]).tolist())
    return (
        {number: reason for number, reason in why.items() if number not in in_part},
        {number: reason for number, reason in why.items() if number in in_part},
    )


def _numbers(rows: Rows, lengths: RowLengths | None) -> np.ndarray:
    """Which row of its source each is that was looked at, int64 `[rows]`."""
    return np.asarray(rows.numbers if lengths is None or lengths.numbers is None else lengths.numbers, np.int64)


def _shares(ledger: Ledger, used: Dataset | None) -> dict[str, Any]:
    """What each of several sources has of the rows that are trained on, in tokens too where shares are of tokens."""
    if not ledger.parts:
        return {}
    if used is not None and ROW_NUMBER in used.column_names:
        ids = [name for name in used.column_names if name.endswith("_ids")]
        by_tokens = ids and ledger.parts[0].tokens is not None
        tokens = lengths_of_rows(used.select_columns(ids)) if by_tokens else None
        ledger = counted(ledger, np.asarray(used[ROW_NUMBER]), tokens)
    return {"parts": [asdict(part) for part in ledger.parts], "left_over": ledger.left_over}


def _reasons(what: str, why: Mapping[int, str], places: Places) -> list[dict[str, Any]]:
    """The reasons why something became of rows, the most frequent first, each with the first rows."""
    by_reason: dict[str, list[int]] = {}
    for number in sorted(why):
        by_reason.setdefault(why[number], []).append(number)
    found = sorted(by_reason.items(), key=lambda one: -len(one[1]))
    if len(found) > _REASONS:  # those that say what is in the row
        others = sorted(number for _, numbers in found[_REASONS - 1 :] for number in numbers)
        found = [*found[: _REASONS - 1], (f"{len(found) - _REASONS + 1:,} other reasons", others)]
    return [_reason(what, reason, numbers, places) for reason, numbers in found]


def _reason(what: str, why: str, numbers: Sequence[int], places: Places) -> dict[str, Any]:
    first = [places.told(number) for number in numbers[:_ROWS]]
    return {"what": what, "why": why, "count": len(numbers), "first": first}
