"""One stage: read, build, measure, train, measure, save. Run by worker.py in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import PartialState

from alignctl.config.stages import StageConfig
from alignctl.data.rows import said_of, shared_said
from alignctl.data.section import read_section
from alignctl.errors import LaunchError, Stopped
from alignctl.methods.registry import methods
from alignctl.models.loading import load_tokenizer
from alignctl.monitor.callbacks import ProgressFile, StopOnRequest
from alignctl.monitor.heartbeat import Heartbeat, RehearsalHeartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.monitor.trackers import Trackers, reporting
from alignctl.run.files import write_json
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.stage.build import build_arguments, build_trainer, rows_to_train_on, sees_gpu
from alignctl.stage.job import Job, Weights, rank
from alignctl.stage.ledger import write_ledgers
from alignctl.stage.measure import measured, random_state_kept
from alignctl.stage.rehearsal import Rehearsal, found_before, longest, rehearsed, scratch, wants_rehearsal
from alignctl.stage.rows import as_written, check_form, check_skipped, texts_of, tokens_of
from alignctl.stage.save import save
from alignctl.stage.training import check_room, check_warm_up, full_disk_explained, out_of_memory_explained, train
from alignctl.trainers.base.managed import StageTrainer


def run_stage(stage: StageConfig, weights: Weights, paths: StagePaths, signal: StopSignal) -> None:
    """Runs a stage to its result, continuing from its newest complete checkpoint if there is one.

    Args:
        weights: Of the method's roles, the trained one first.
        signal: Looked at at the end of every optimizer step.

    Raises:
        Stopped: Training was stopped on request; its checkpoint continues it.
        AlignctlError: Something the user can mend.
    """
    with full_disk_explained(paths), out_of_memory_explained():
        _check_gpus(stage)
        heartbeat = Heartbeat(paths, rank())
        job = prepare(stage, weights, paths, heartbeat, signal)
        with _reporting(job) as trackers:
            if wants_rehearsal(job):
                found = _rehearse(job, heartbeat, signal)
                job = replace(job, args=build_arguments(stage, paths, found))
            _work(replace(job, trackers=trackers))


@contextmanager
def _reporting(job: Job) -> Iterator[Trackers]:
    """The trackers that the stage reports to, of the first process alone. Where the stage is stopped, the others wait
    for what it has to tell them: torchrun ends all processes once one has left."""
    names = job.stage.tracker.names
    try:
        if rank() or not names:
            yield Trackers()
        else:
            job.progress.phase(f"starting {', '.join(names)}")
            with reporting(job.stage, RunPaths(job.paths.root.parent), job.progress.notice) as trackers:
                yield trackers
    except Stopped:
        if names:
            PartialState().wait_for_everyone()
        raise


def _check_gpus(stage: StageConfig) -> None:
    """Whether the GPUs that were asked for are seen: training on the CPU beside them would be a costly mistake.

    Raises:
        LaunchError: They are not.
    """
    if stage.launcher.gpus_per_node and not stage.trainer.get("use_cpu") and not sees_gpu():
        raise LaunchError(
            f"`launcher.gpus_per_node={stage.launcher.gpus_per_node}`, and torch sees no GPU",
            "look at the driver, at torch's build (`torch.version.cuda`), and at the container's options (`--nv`)",
        )


def prepare(stage: StageConfig, weights: Weights, paths: StagePaths, heartbeat: Heartbeat, signal: StopSignal) -> Job:
    """Reads rows and tokenizer; loads no model and trains nothing."""
    method = methods()[stage.method]
    progress = ProgressFile(paths, method.key_metrics, heartbeat, is_first=rank() == 0)
    progress.phase("reading data")
    start = weights[method.trained]
    rows, held_rows = read_section(
        stage.data,
        method.data_kind,
        stage.seed,
        method.row_columns,
        partial(progress.count, "rows"),
        partial(tokens_of, stage.model.tokenizer or start, stage.model),
        partial(progress.count, "bytes"),
    )
    progress.notice(said_of(rows.ledger))
    if held_rows is not None and held_rows.ledger.shared_prompts:
        progress.notice(shared_said(held_rows.ledger))
    progress.phase("loading model")
    tokenizer, new_tokens = load_tokenizer(stage.model, start, texts=lambda: texts_of(rows.dataset))
    check_form(rows, held_rows, stage)
    rows, held_rows = (part and as_written(part, tokenizer, start, stage, progress) for part in (rows, held_rows))
    for part in (rows, held_rows):
        if part is not None:
            check_skipped(part, stage)
    args = build_arguments(stage, paths, found_before(paths))
    return Job(stage, weights, paths, progress, StopOnRequest(signal), tokenizer, rows, held_rows, new_tokens, args)


def _rehearse(job: Job, heartbeat: Heartbeat, signal: StopSignal) -> dict[str, Any]:
    """Does the whole stage in small, and says what that took.

    Returns:
        Fields of the stage that were left to it.

    Raises:
        KeyboardInterrupt: A stop was requested; there is nothing to continue from.
        AlignctlError: As the stage itself would, later.
    """
    job.progress.phase("rehearsing")
    began = time.monotonic()
    some, rehearsal = longest(job.rows, job), Rehearsal.of(job)
    held = job.held_rows and longest(job.held_rows, job, count=2 * job.stage.eval.batch_size)
    with scratch(job.paths) as there, full_disk_explained(there), random_state_kept():
        stage = rehearsed(job.stage)
        small = replace(
            job,
            stage=stage,
            paths=there,
            progress=ProgressFile(there, (), RehearsalHeartbeat(heartbeat), is_first=rank() == 0),
            stop=StopOnRequest(signal),
            rows=some,
            held_rows=held,
            args=build_arguments(stage, there, {}),
        )
        try:
            _work_in_small(small, rehearsal)
        except Stopped as error:
            raise KeyboardInterrupt from error
    rehearsal.seconds = round(time.monotonic() - began, 1)
    for notice in rehearsal.notices():
        job.progress.notice(notice)
    if PartialState().is_main_process:
        write_json(job.paths.rehearsal, rehearsal.to_dict())
    return rehearsal.fitting.found


def _work_in_small(job: Job, rehearsal: Rehearsal) -> None:
    """What `_work` does, and the end of training once more, which loads the last checkpoint."""
    trainer = _begin(job)
    rehearsal.begins(trainer)
    measuring = measured(job, trainer)
    with rehearsal.saving():
        train(job, trainer)
        if rehearsal.saved_wholly:
            train(job, trainer)
        save(job, trainer, measuring, measuring.after(), rehearsal.saved_wholly)
    rehearsal.fitting.look(trainer.args.device)


def _work(job: Job) -> None:
    """The stage on rows as its tokenizer can write them."""
    trainer = _begin(job)
    check_room(job, trainer, trainer.num_entries)  # before anything is written that other settings would spoil
    measuring = measured(job, trainer)
    train(job, trainer)
    save(job, trainer, measuring, measuring.after())


def _begin(job: Job) -> StageTrainer:
    """The trainer of the stage, and what is written of its rows."""
    rows, held_rows = rows_to_train_on(job)
    trainer = build_trainer(job, rows, held_rows)
    write_ledgers(job, trainer, rows, held_rows)
    check_warm_up(job, trainer)
    return trainer
