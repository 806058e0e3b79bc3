"""What a stage leaves: its model or adapter, the samples, and last of all its result."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from alignctl.evaluate.certainty import certainty, of_sums, of_wins
from alignctl.evaluate.evaluator import Evaluation
from alignctl.evaluate.judges import JUDGES, win_rate
from alignctl.models.comparing import rows_to_compare, said_of
from alignctl.models.loading import longest_seen
from alignctl.models.saving import Saved, Trained, save_finished
from alignctl.models.saving_divided import save_divided
from alignctl.models.sharding import undivided
from alignctl.run.disk import shown_bytes
from alignctl.run.files import read_json, write_json, write_json_lines
from alignctl.stage.finished_type import checkpoint_type, finished_type
from alignctl.stage.job import Job
from alignctl.stage.measure import Measuring
from alignctl.stage.models import load_under_adapter
from alignctl.stage.rows import texts_of
from alignctl.trainers.base.managed import StageTrainer


def save(
    job: Job,
    trainer: StageTrainer,
    measuring: Measuring,
    after: Evaluation,
    wholly: bool = True,
) -> None:
    """Saves the trained model, then samples and result; all processes call it together.

    Args:
        wholly: Whether all of it is written, so that it can be compared with what was trained.
    """
    job.progress.phase("saving model")
    stage, trained = job.stage, trainer.trained_model
    divided = trainer.is_divided
    texts = texts_of((job.held_rows or job.rows).dataset)
    rows = [] if divided else rows_to_compare(job.tokenizer, texts, longest_seen(trained))
    facts, said = measuring.facts(), said_of(trained, rows)
    finished = Trained(
        trained,
        trainer.start,
        rows,
        said,
        # FSDP2 casts the weights of a layer for mixed precision as it gathers them.
        computed_in_16_bits=trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no",
        dtype=finished_type(job),
        merge=stage.model.merge,
        wholly=wholly,
    )
    made = {"checkpoint_type": checkpoint_type(job)}
    saved = None
    with undivided():
        if divided or trainer.is_world_process_zero():
            save_as = save_divided if divided else save_finished
            saved = save_as(finished, job.tokenizer, job.paths, partial(load_under_adapter, job), facts, made)
    if trainer.is_world_process_zero():
        if saved:
            _say(job, saved, divided)
        result = _write_result(job, trainer.state.global_step, measuring, after, saved)
        job.trackers.report(trainer, result | {"before": None})  # told when it was measured
    trainer.accelerator.wait_for_everyone()


def _say(job: Job, saved: Saved, divided: bool) -> None:
    """One line about the finished model, and one where a later stage does not start from what was trained.

    Args:
        divided: Whether processes divide the model.
    """
    size = f"model/: {saved.dtype}, {shown_bytes(saved.bytes)}"
    if divided:
        size += "; each tensor was read back and has the bits that were written"
    elif saved.difference is None:
        size += "; there is too little memory to load it once more and compare it with what was trained"
    elif saved.rounded:
        apart, what = saved.difference, "log-probabilities" if job.method.trained == "policy" else "scores"
        size += f"; rounding changes its {what} by {apart.mean:.2g} on average, at most {apart.largest:.2g}"
    job.progress.notice(size)
    if job.stage.taken_by and saved.rounded:
        names = ", ".join(f"`{name}`" for name in job.stage.taken_by)
        job.progress.notice(f"{names} takes the model as it stands in {job.paths.model}, in {saved.dtype}")


def _write_result(
    job: Job,
    steps: int,
    measuring: Measuring,
    after: Evaluation,
    saved: Saved | None,
) -> dict[str, Any]:
    """Writes samples and, last of all, the result, which is returned: a stage that has one is done."""
    questions, before, paths = measuring.held_out.questions, measuring.before, job.paths
    if questions is not None:
        answers_before = before.completions if before else [None] * len(questions.texts)
        rows = zip(questions.texts, answers_before, after.completions, strict=True)
        write_json_lines(paths.samples, [{"prompt": q, "before": b, "after": a} for q, b, a in rows])
    result: dict[str, Any] = {"steps": steps, "before": before.metrics if before else None, "after": after.metrics}
    result |= {"product": "model", "saved": asdict(saved)} if saved else {"product": "adapter"}
    if rehearsal := read_json(paths.rehearsal):
        result["rehearsal_s"] = rehearsal["seconds"]
    sure = certainty(before.values if before else {}, after.values, after.counts)
    if before and before.batches == after.batches:
        sure |= of_sums(before.adds, after.adds, after.counts)
    judge = JUDGES.get(job.stage.eval.judge)
    if judge and questions and before:
        rate = win_rate(judge, questions.texts, after.completions, before.completions)
        result["win_rate"], sure["win_rate"] = rate, of_wins(rate, len(questions.texts))
    result["certainty"] = {name: asdict(one) for name, one in sure.items()}
    write_json(paths.result, result)
    return result
