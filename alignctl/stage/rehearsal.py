"""The first minute of a stage: all of it on a few rows, so that what would fail after hours fails now.

The rehearsal loads models of its own and throws them away. Training the real ones for two steps and putting weights,
optimizer, schedule, data order and metrics back would spare the loading, but leave a trace wherever one is forgotten.
Used by run.py.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from alignctl.config.stages import StageConfig
from alignctl.data.reading import Rows
from alignctl.data.tokenizing import tokenize_prompt
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json
from alignctl.run.paths import StagePaths
from alignctl.stage.job import Job
from alignctl.trainers.base.device import let_go
from alignctl.trainers.base.room import optimizer_steps

STEPS = 2  # the second is the first with the optimizer's state in memory
_LEAST_STEPS = 20
_PACKED = 16  # rows for each packed one
_PROMPTS = 4


def wants_rehearsal(job: Job) -> bool:
    """Whether a stage begins with a rehearsal: one that is short, or was begun before, does not."""
    begun = job.paths.rehearsal.exists() or newest_checkpoint(job.paths.checkpoints) is not None
    return job.stage.rehearse and not begun and optimizer_steps(job.args, len(job.rows.dataset)) >= _LEAST_STEPS


def found_before(paths: StagePaths) -> dict[str, Any]:
    """Fields of the stage that its rehearsal found, if it had one."""
    return (read_json(paths.rehearsal) or {}).get("found", {})


def rehearsed(stage: StageConfig) -> StageConfig:
    """A stage as it is rehearsed: two steps, evaluated if it is while training, saved, and told to nobody."""
    trainer = stage.trainer | {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS, "logging_steps": 1}
    trainer["warmup_steps"] = 0  # which may be longer than that
    if trainer.get("eval_strategy", "no") != "no":
        trainer |= {"eval_strategy": "steps", "eval_steps": STEPS}
    return replace(
        stage,
        trainer=trainer | {"push_to_hub": False},
        report_to="none",
        eval=replace(stage.eval, prompts=min(stage.eval.prompts, _PROMPTS)),
        data=replace(stage.data, max_too_long=1.0),  # of the longest rows, any number may be
    )


def longest(rows: Rows, job: Job, count: int | None = None) -> Rows:
    """The longest rows, by their characters, whose prompts leave room for something to be trained on.

    Args:
        count: How many; None for as many as are trained on.
    """
    args = job.args
    if count is None:
        count = STEPS * args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        count = count // getattr(args, "num_generations", 1) * (_PACKED if getattr(args, "packing", False) else 1)
    limit = getattr(args, "max_prompt_length", getattr(args, "max_length", None)) or math.inf
    lengths = [len(str(row)) for row in rows.dataset]
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = rows.dataset[index]
        if "prompt" not in row or len(tokenize_prompt(job.tokenizer, row["prompt"])) < limit:
            chosen.append(index)
        if len(chosen) == count:
            break
    return rows.select(chosen) if chosen else rows


@contextmanager
def scratch(paths: StagePaths) -> Iterator[StagePaths]:
    """A folder for the files of the rehearsal, gone afterwards with the memory its models had. Of a batch that came to
    no number, the rows are kept."""
    folder = StagePaths(paths.rehearsing)
    processes = PartialState()
    if processes.is_main_process:
        shutil.rmtree(folder.root, ignore_errors=True)
        folder.root.mkdir(parents=True)
    processes.wait_for_everyone()
    cache = os.environ.get("ALIGNCTL_CACHE")
    os.environ["ALIGNCTL_CACHE"] = str(folder.root / "cache")
    try:
        yield folder
        processes.wait_for_everyone()
    finally:
        if cache is None:
            del os.environ["ALIGNCTL_CACHE"]
        else:
            os.environ["ALIGNCTL_CACHE"] = cache
        if processes.is_main_process:
            if folder.not_finite.exists():
                folder.not_finite.replace(paths.not_finite)
            shutil.rmtree(folder.root, ignore_errors=True)
        let_go()
