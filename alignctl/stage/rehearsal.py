"""The first minute of a stage: all of it on a few rows, so that what would fail after hours fails now.

The rehearsal loads models of its own and throws them away. Training the real ones for two steps and putting weights,
optimizer, schedule, data order and metrics back would spare the loading, but leave a trace wherever one is forgotten.
Used by run.py.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from alignctl.config.stages import StageConfig
from alignctl.data.converters import unpair
from alignctl.data.rows import Rows
from alignctl.data.scanning import characters
from alignctl.methods.registry import resolve
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.disk import seconds_to_write, shown_bytes
from alignctl.run.files import read_json
from alignctl.run.owner import take_away
from alignctl.run.paths import StagePaths
from alignctl.stage.build import left_to_rehearsal
from alignctl.stage.job import Job
from alignctl.stage.proof import only_beginnings
from alignctl.stage.training import check_room
from alignctl.trainers.base.device import let_go
from alignctl.trainers.base.fitting import Fitting
from alignctl.trainers.base.managed import StageTrainer
from alignctl.trainers.base.room import optimizer_steps, steps_between_saves

STEPS = 2  # the second is the first with the optimizer's state in memory
_LEAST_STEPS = 20
_PACKED = 16  # rows for each packed one
_PROMPTS = 4
_LITTLE = 500_000_000  # bytes that are saved without further thought
_SAVING_S = 30  # seconds that saving all and loading it may take
_MINUTES_FROM = 120  # seconds


@dataclass
class Rehearsal:
    """What a rehearsal finds out, for the stage that it is of."""

    job: Job
    """The stage as it will be run."""
    fitting: Fitting
    seconds: float = 0.0
    saved_wholly: bool = True
    """Whether all that would be saved is, and is loaded back."""
    _saving: tuple[int, float] | None = None  # bytes and seconds of a checkpoint
    _times: StepTimes = field(default_factory=lambda: StepTimes())

    @classmethod
    def of(cls, job: Job) -> Rehearsal:
        left = left_to_rehearsal(job.stage)
        return cls(job, Fitting(tokens="pass_tokens" in left, checkpointing="activation_checkpointing" in left))

    def begins(self, trainer: StageTrainer) -> None:
        """Looks at the room for the stage itself, and at how long it takes to save.

        Raises:
            LaunchError: The disk has less free than the stage is going to write.
        """
        writes = check_room(self.job, trainer, self._rows())
        trainer.fitting = self.fitting
        trainer.add_callback(self._times)
        if writes.checkpoint + writes.finished > _LITTLE:
            folder, count = Path(trainer.args.output_dir), writes.checkpoint
            folder.mkdir(parents=True, exist_ok=True)
            seconds = seconds_to_write(count, folder) if trainer.is_world_process_zero() else 0.0
            [seconds] = broadcast_object_list([seconds])
            self._saving = count, seconds
            self.saved_wholly = 2 * seconds * (count + writes.finished) / count < _SAVING_S  # it is read, too
        if not self.saved_wholly:
            trainer.args.load_best_model_at_end = False  # of which there is the beginning of each tensor

    def saving(self) -> AbstractContextManager[None]:
        """To train and save in."""
        return nullcontext() if self.saved_wholly else only_beginnings()

    def notices(self) -> Iterator[str]:
        """What people should know of it."""
        saved = "saved and loaded back" if self.saved_wholly else "saved as far as the beginning of each tensor"
        yield (
            f"rehearsed in {self.seconds:g} s: {STEPS} steps on the longest rows, measured, {saved}"
            + self.fitting.said()
        )
        if self._saving is None:
            return
        count, seconds = self._saving
        said = f"a checkpoint is of {shown_bytes(count)}, and takes about {_shown_seconds(seconds)} beside training"
        every = steps_between_saves(self.job.args, self._rows())
        if every and seconds > every * self._times.last > 0:
            fewer = math.ceil(seconds / self._times.last)
            said += f", which waits for it every {every:,} steps: with `{self.job.stage.name}.save_steps={fewer}` not"
        yield said

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        count, seconds = self._saving or (None, None)
        saving = {"checkpoint_bytes": count, "checkpoint_s": seconds and round(seconds, 1)} if count else {}
        return {"seconds": self.seconds} | saving | self.fitting.to_dict()

    def _rows(self) -> int:
        """That the stage is trained on, or fewer: packed ones are not known yet."""
        rows = len(self.job.rows.dataset)
        return max(1, rows // _PACKED) if getattr(self.job.args, "packing", False) else rows


class StepTimes(TrainerCallback):
    """Seconds that the last optimizer step took."""

    def __init__(self) -> None:
        self.last = self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.monotonic() - self._began


def _shown_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM else f"{seconds / 60:.0f} min"


def wants_rehearsal(job: Job) -> bool:
    """Whether a stage begins with a rehearsal: one that is short, or was begun before, does not."""
    begun = job.paths.rehearsal.exists() or newest_checkpoint(job.paths.checkpoints) is not None
    return job.stage.rehearse and not begun and optimizer_steps(job.args, len(job.rows.dataset)) >= _LEAST_STEPS


def found_before(paths: StagePaths) -> dict[str, Any]:
    """Fields of the stage that its rehearsal found, if it had one."""
    return (read_json(paths.rehearsal) or {}).get("found", {})


def rehearsed(stage: StageConfig) -> StageConfig:
    """A stage as it is rehearsed: two steps, evaluated if it is while training, and saved."""
    trainer = stage.trainer | {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS, "logging_steps": 1}
    trainer["warmup_steps"] = 0  # which may be longer than that
    if trainer.get("eval_strategy", "no") != "no":
        trainer |= {"eval_strategy": "steps", "eval_steps": STEPS}
    return replace(
        stage,
        trainer=trainer | {"push_to_hub": False},
        eval=replace(stage.eval, prompts=min(stage.eval.prompts, _PROMPTS)),
        data=replace(stage.data, max_lost=1.0, max_truncated=None),  # of the longest rows, any number may be
    )


def longest(rows: Rows, job: Job, count: int | None = None) -> Rows:
    """The longest rows, by their characters, of those that are not lost.

    Args:
        count: How many; None for as many as are trained on.
    """
    args = job.args
    if count is None:
        count = STEPS * args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        count = count // getattr(args, "num_generations", 1) * (_PACKED if getattr(args, "packing", False) else 1)
    columns = resolve(job.method.trainer).token_columns(
        args, rows.dataset.column_names, getattr(args, "packing", False)
    )
    are_pairs = job.method.data_kind == "feedback" != rows.format.kind  # and are taken apart later
    chosen: list[int] = []
    for index in np.argsort(-characters(rows.dataset), kind="stable").tolist():
        row = rows.dataset[index]
        if all(columns.fits(job.tokenizer, one) for one in (unpair(row) if are_pairs else [row])):
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
        take_away(folder.root)
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
