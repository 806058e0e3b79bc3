"""The rows of a stage: as its tokenizer can write them, and what became of each. Used by run.py."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignctl.config.stages import StageConfig
from alignctl.data.encoding import encodes_batches, tokenizer_key
from alignctl.data.kept import kept
from alignctl.data.messages import is_messages
from alignctl.data.recast import as_plain_text
from alignctl.data.rows import Rows
from alignctl.data.tokenizing import tokenize_prompt
from alignctl.errors import RequestError
from alignctl.models import template
from alignctl.models.loading import longest_seen
from alignctl.models.template import check_template
from alignctl.monitor.callbacks import ProgressFile
from alignctl.run.files import read_json, write_json
from alignctl.stage.job import Job
from alignctl.trainers.base.managed import StageTrainer


def texts_of(dataset: Dataset) -> Iterator[str]:
    """All text of the rows, to train a tokenizer on."""
    for row in dataset:
        for value in row.values():
            if isinstance(value, str):
                yield value
            elif is_messages(value):
                yield from (message["content"] for message in value)


def as_written(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, start: str | None, stage: StageConfig, progress: ProgressFile
) -> Rows:
    """Rows as the tokenizer can write them; says what is odd about how it does, and which it cannot write.

    Raises:
        RequestError: It can write none of them, or not all and `on_bad_row` is fail.
    """
    if tokenizer.chat_template is None:
        return as_plain_text(rows, start or "the stage")
    if not any(is_messages(value) for value in rows.dataset[0].values()):
        return rows
    refused, notices = _checked(tokenizer, rows.dataset, partial(progress.count, "rows"))
    for notice in notices:
        progress.notice(notice)
    if not refused:
        return rows
    example = (
        f"the chat template cannot write {len(refused):,} of {len(rows.dataset):,} rows: {next(iter(refused.values()))}"
    )
    if stage.data.on_bad_row == "fail" or len(refused) == len(rows.dataset):
        raise RequestError(
            f"{rows.ledger.source}: {example}", "give another template with `model.chat_template=FILE`, or other rows"
        )
    progress.notice(f"{example}; they are left out")
    return rows.select([i for i in range(len(rows.dataset)) if i not in refused])


def _checked(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, count: Callable[[int], None]
) -> tuple[dict[int, str], list[str]]:
    """What `check_template` says of all rows: one process asks it, and the others take its word."""

    def make(folder: Path) -> None:
        refused, notices = check_template(tokenizer, _counted(rows, count))
        write_json(folder / "said.json", {"refused": refused, "notices": notices})

    if not encodes_batches(tokenizer):  # there is no telling whether two of them are the same
        return check_template(tokenizer, _counted(rows, count))
    code = hashlib.sha256(Path(template.__file__).read_bytes()).hexdigest()
    folder = kept(["checked", rows._fingerprint, tokenizer_key(tokenizer), code], make)
    said = read_json(folder / "said.json")
    return {int(position): reason for position, reason in said["refused"].items()}, said["notices"]


def _counted(rows: Dataset, count: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Rows one by one, which are counted as they are taken."""
    for row in rows:
        yield row
        count(1)


def write_ledgers(job: Job, trainer: StageTrainer, rows: Rows, held_rows: Rows | None) -> None:
    """What became of all rows, those included that trainers drop because nothing of them is left within `max_length`.

    Raises:
        RequestError: Too many of the training rows are.
    """
    stage, ledgers = job.stage, {}
    for part, given, used in (("train", rows, trainer.train_dataset), ("eval", held_rows, trainer.eval_dataset)):
        if given is not None and used is not None:
            left = _left_by_packing(given, stage, trainer) if stage.trainer.get("packing") else len(used)
            ledgers[part] = asdict(given.ledger) | {"too_long": len(given.dataset) - left}
    if trainer.is_world_process_zero():
        write_json(job.paths.data, ledgers)
    lost, count = ledgers["train"]["too_long"], len(rows.dataset)
    if lost == count or lost > stage.data.max_too_long * count:
        limit = longest_seen(trainer.trained_model)
        field = "max_length" if hasattr(trainer.args, "max_length") else "max_prompt_length"
        key, length, percent = f"{stage.name}.{field}", getattr(trainer.args, field), math.ceil(100 * lost / count)
        why = "nothing of a completion is left" if field == "max_length" else "their prompts are longer"
        raise RequestError(
            f"{lost:,} of {count:,} training rows ({percent} %) are lost: with `{key}={length}` {why}, and "
            f"`data.max_too_long={stage.data.max_too_long:g}` is the most allowed",
            (f"raise `{key}`, or " if not limit or length < limit else "")
            + "take rows with long prompts out"
            + (f"; `data.max_too_long={percent / 100:g}` accepts it" if lost < count else ""),
        )


def _left_by_packing(rows: Rows, stage: StageConfig, trainer: StageTrainer) -> int:
    """Rows of which something is trained on: what fills `max_length` before its completion is cut while packing."""
    if "completion" not in rows.dataset.column_names:
        return len(rows.dataset)
    tokenizer, longest = trainer.processing_class, trainer.args.max_length
    left = rows.dataset.filter(
        lambda row: len(tokenize_prompt(tokenizer, row["prompt"])) < longest,
        num_proc=stage.trainer.get("dataset_num_proc"),
        desc="Counting rows",
    )
    return len(left)
