"""The training of a stage, and how it ends: from which checkpoint, with how much room, on which rows. Used by run.py.

What a trainer cannot say to people, because it knows nothing of run directories, is said here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.config.warm_up import warm_up_problem
from alignctl.errors import AlignctlError, LaunchError, NotANumber, RequestError, Stopped
from alignctl.run.checkpoints import (
    DAMAGED,
    STAGING,
    Checkpoint,
    changed_files,
    finish_staged,
    is_read,
    newest_checkpoint,
    set_aside,
    set_aside_torn,
)
from alignctl.run.disk import free_bytes, lack_of_room, shown_bytes
from alignctl.run.files import write_json
from alignctl.run.paths import StagePaths
from alignctl.run.room import Writes, refuse_full_disk
from alignctl.run.shares import must_convert, shares
from alignctl.stage.finished_type import finished_type
from alignctl.stage.job import Job
from alignctl.trainers.base.device import ran_out
from alignctl.trainers.base.managed import StageTrainer
from alignctl.trainers.base.not_finite import NotFinite
from alignctl.trainers.base.room import checkpoints_at_a_time, optimizer_steps, writes_of
from alignctl.trainers.base.shards import find_foreign
from alignctl.trainers.base.universal import converted

_SAID = 200  # characters of what torch says


def train(job: Job, trainer: StageTrainer) -> None:
    """Trains from the newest complete checkpoint, or from the start.

    Raises:
        Stopped: As requested.
        AlignctlError: Loss, gradient or weights are no numbers any more.
    """
    progress = job.progress
    checkpoint = _continue_from(job, trainer)
    if not (checkpoint and trainer.take_over(checkpoint)):
        if checkpoint and trainer.args.save_only_model:
            progress.notice("checkpoints hold the model alone (`save_only_model`): training starts from the beginning")
            checkpoint = None
        trainer.add_callback(StepsAsPlanned(job))
        try:
            folder = _for_these_processes(job, trainer, checkpoint) if checkpoint else None
            trainer.train(resume_from_checkpoint=folder and str(folder))
        except NotFinite as error:
            raise _not_finite(job, trainer, error) from error
        except NotANumber as error:
            raise _not_a_number(job, trainer, error) from error
    state = trainer.state
    if job.stop.stopped:
        raise Stopped(f"stopped at step {state.global_step} of {state.max_steps}; a checkpoint is saved")
    if trainer.stops_early is not None and state.global_step < state.max_steps:
        progress.notice(
            f"stopped early after step {state.global_step} of {state.max_steps}: "
            f"`{trainer.args.metric_for_best_model}` of the held-out rows has not got better for "
            f"{trainer.args.early_stopping_patience} evaluations"
        )
    if (since := trainer.unchanged.since) is not None:
        progress.notice(
            f"steps {since + 1} to {state.global_step} changed no weight: is `{job.stage.name}.learning_rate="
            f"{trainer.args.learning_rate:g}` too small for weights in {trainer.trained_model.dtype}?"
        )
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = Path(state.best_model_checkpoint).name
        progress.notice(f"the model is that of {best}, the best by `{trainer.args.metric_for_best_model}`")


class StepsAsPlanned(TrainerCallback):
    """Compares the optimizer steps that a trainer comes to with those of the plan's batches, before the first one."""

    def __init__(self, job: Job):
        self._job = job

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """As transformers calls it.

        Raises:
            AlignctlError: They differ.
        """
        if args.auto_find_batch_size:
            return  # which takes smaller batches where the memory does not suffice
        stage, rows = self._job.stage, len(train_dataloader.dataset)
        together = args.per_device_train_batch_size * stage.launcher.world_size
        planned = optimizer_steps(args, rows, together)
        if state.max_steps != planned:
            raise AlignctlError(
                f"`{stage.name}` would take {state.max_steps:,} optimizer steps, and by the plan, with batches of "
                f"{together:,} rows in all processes together, {planned:,}",
                f"take out of `{stage.name}` what divides batches otherwise; if nothing does, this is an error of "
                "alignctl: please report it",
            )


def _refuse_foreign(checkpoint: Checkpoint, trainer: StageTrainer) -> None:
    """Refuses a checkpoint that is not DeepSpeed's own, before any process has DeepSpeed read it.

    Raises:
        AlignctlError: It is not.
    """
    place = trainer.accelerator.process_index, trainer.accelerator.num_processes
    foreign = [found for found in gather_object([find_foreign(checkpoint.path, *place)]) if found]
    if foreign:
        raise AlignctlError(
            f"{checkpoint.path} is not as DeepSpeed saves it, so it is not read: {foreign[0]}",
            f"if you do not know where it is from, ask who does; without {checkpoint.path.name}, training continues "
            "from the one before",
        )


def _continue_from(job: Job, trainer: StageTrainer) -> Checkpoint | None:
    """The checkpoint to continue from, whose files are hashed, by each process its own; says which are not taken and
    why, and sets them aside. Damage to what training does not read is only said.

    Raises:
        AlignctlError: It holds what DeepSpeed does not save, and would run.
    """
    folder, accelerator = job.paths.checkpoints, trainer.accelerator
    torn: dict[Path, str] = {}
    if trainer.is_world_process_zero():
        job.paths.not_finite.unlink(missing_ok=True)
        finish_staged(folder)  # of a run that was killed
        torn = set_aside_torn(folder)
    accelerator.wait_for_everyone()
    while newest := newest_checkpoint(folder):
        changed = gather_object(changed_files(newest, accelerator.process_index, accelerator.num_processes))
        flaws = {name: f"the content of {name} has changed since it was written" for name in changed}
        if not (read := [flaw for name, flaw in flaws.items() if is_read(name)]):
            for flaw in (*newest.flaws, *flaws.values()):
                job.progress.notice(f"{newest.path.name}: {flaw}; training does not read it, and continues from there")
            break
        if trainer.is_world_process_zero():
            torn[newest.path] = read[0]
            set_aside(newest.path)
        accelerator.wait_for_everyone()
    if newest and newest.kind["zero_stage"]:
        _refuse_foreign(newest, trainer)
    instead = f"training continues from {newest.path.name}" if newest else "training starts from the beginning"
    for path, flaw in torn.items():
        job.progress.notice(f"{path.name} cannot be used and is set aside in {folder / DAMAGED}: {flaw}; {instead}")
    return newest


def _for_these_processes(job: Job, trainer: StageTrainer, checkpoint: Checkpoint) -> Path:
    """The folder to continue from: the checkpoint's, or what is made of it where others wrote it.

    Raises:
        RequestError: It cannot be converted.
        LaunchError: There is no room for it.
    """
    now = trainer.checkpoint_kind()
    if not must_convert(checkpoint, now):
        return checkpoint.path
    needed, free = writes_of(trainer, 1, trainer.trained_model).conversion, free_bytes(checkpoint.path)
    if needed > free:
        raise LaunchError(
            f"the disk of {checkpoint.path} has {shown_bytes(free)} free, and {shown_bytes(needed)} are needed to "
            f"convert it for {shares(now)}",
            f"make room, or go on with {shares(checkpoint.kind)}, which wrote it",
        )
    job.progress.phase("loading checkpoint")
    job.progress.notice(f"step {checkpoint.step} was saved by {shares(checkpoint.kind)}; converted for {shares(now)}")
    return converted(trainer, checkpoint)


def _not_a_number(job: Job, trainer: StageTrainer, error: NotANumber) -> AlignctlError:
    """What to tell people of drawing or measuring in the middle of training that came to no number."""
    newest, problem = newest_checkpoint(job.paths.checkpoints), error.problems[0]
    return AlignctlError(
        f"{problem.message}; training was stopped after step {trainer.state.global_step}, and "
        + (f"the newest checkpoint is {newest.path}" if newest else "there is no checkpoint yet"),
        problem.hint or f"give another `run_dir` and a lower `{job.stage.name}.learning_rate`",
    )


def _not_finite(job: Job, trainer: StageTrainer, error: NotFinite) -> AlignctlError:
    """What to tell people; the rows of the batch are written down."""
    stage, paths = job.stage, job.paths
    newest = newest_checkpoint(paths.checkpoints)
    if trainer.is_world_process_zero():
        content = {
            "what": error.what,
            "step": error.step,
            "data": stage.data.mix or stage.data.path,
            "batches": [
                {key: str(value) if isinstance(value, float) else value for key, value in asdict(one).items()}
                for one in error.troubles
            ],
            "reproduce": f"the same command, which goes on from {newest.path if newest else 'the beginning'}",
        }
        write_json(paths.not_finite, content)
    and_weights = " and at the weights that training began with" if error.step == 1 else ""
    return AlignctlError(
        f"{error.what} of step {error.step} is not finite, and training was stopped; "
        + (f"{newest.path} is from before" if newest else "there is no checkpoint yet")
        + f". The rows of the batch are listed in {paths.not_finite}",
        f"look at those rows{and_weights}, or give another `run_dir` and a lower `{stage.name}.learning_rate`; the "
        "same command comes to the same step again",
    )


def check_warm_up(job: Job, trainer: StageTrainer) -> None:
    """Refuses a warm-up that training ends with.

    Raises:
        RequestError: It takes as many steps as the training, or more.
    """
    steps = optimizer_steps(trainer.args, trainer.num_entries)
    if problem := warm_up_problem(job.stage.name, job.stage.trainer, steps):
        raise RequestError(problem.message, problem.hint)


def check_room(job: Job, trainer: StageTrainer, rows: int) -> Writes:
    """Refuses what would fill the disk, before the first step.

    Args:
        trainer: The stage's, or one that rehearses it.
        rows: That the stage is trained on.

    Raises:
        LaunchError: The disk has less free than the stage is going to write.
    """
    stage, paths = job.stage, job.paths
    checkpoints = checkpoints_at_a_time(job.args, rows, stage.trainer.get("save_total_limit"))
    writes = writes_of(trainer, checkpoints, trainer.trained_model, finished_type(job), stage.model.merge)
    if not trainer.is_world_process_zero():
        return writes
    refuse_full_disk(stage, paths.root, writes)
    return writes


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Ends a stage for which the device's memory did not suffice with a few words."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        said = " ".join(str(error).split())[:_SAID]
        raise AlignctlError(
            f"the device has no memory left: {said}",
            "set the stage's `pass_tokens` lower or `activation_checkpointing=true`, for what is drawn `rollout_tokens`"
            " or `eval.batch_size` lower: these change no number, and the same command continues",
        ) from error


@contextmanager
def full_disk_explained(paths: StagePaths) -> Iterator[None]:
    """Ends a stage that could not write for lack of room with a few words, and leaves nothing half written."""
    try:
        yield
    except Exception as error:
        staging = paths.checkpoints / STAGING
        reason = lack_of_room(error, staging)
        if reason is None:
            raise
        shutil.rmtree(staging, ignore_errors=True)
        newest = newest_checkpoint(paths.checkpoints)
        raise AlignctlError(
            f"there is no room left to write to: {reason}, with {shown_bytes(free_bytes(paths.root))} free on the disk "
            f"of {paths.root}. What was half written is removed; "
            + (f"{newest.path} is complete" if newest else "there is no checkpoint yet"),
            "make room, and run the same command again: it continues from there",
        ) from error
