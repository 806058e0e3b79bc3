"""What a stage leaves: its model or adapter, the samples, and last of all its result."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from alignctl.config.weights import saved_tensors, saved_type
from alignctl.evaluate.evaluator import Evaluation
from alignctl.evaluate.judges import JUDGES, win_rate
from alignctl.models.comparing import rows_to_compare, said_of
from alignctl.models.loading import longest_seen
from alignctl.models.saving import Saved, Trained, save_finished
from alignctl.models.sharding import undivided, whole_state, whole_weights
from alignctl.run.disk import shown_bytes
from alignctl.run.files import read_json, write_json, write_json_lines
from alignctl.run.paths import PRODUCT_MANIFEST
from alignctl.stage.job import Job
from alignctl.stage.measure import Measuring
from alignctl.stage.models import load_under_adapter
from alignctl.stage.rows import texts_of
from alignctl.trainers.base.managed import StageTrainer

# Types that a model is saved in; a checkpoint may have others, of 8 bits for instance.
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(job: Job, trainer: StageTrainer, measuring: Measuring, before: Evaluation | None, after: Evaluation) -> None:
    """Saves the trained model, then samples and result; all processes call it together."""
    job.progress.phase("saving model")
    stage, trained = job.stage, trainer.trained_model
    texts = texts_of((job.held_rows or job.rows).dataset)
    rows = rows_to_compare(job.tokenizer, texts, longest_seen(trained))
    with whole_weights(trainer.model_wrapped):
        facts = measuring.facts()
        said = said_of(trained, rows)
    state = whole_state(trained)
    if trainer.is_world_process_zero():
        checkpoint_type = _checkpoint_type(job)
        with undivided():
            saved = save_finished(
                Trained(trained, state, trainer.start, rows, said, _dtype(job, checkpoint_type), stage.model.merge),
                job.tokenizer,
                job.paths,
                partial(load_under_adapter, job),
                facts,
                {"checkpoint_type": checkpoint_type},
            )
        if saved:
            _say(job, saved)
        _write_result(job, trainer.state.global_step, measuring, before, after, saved)
    trainer.accelerator.wait_for_everyone()


def _checkpoint_type(job: Job) -> str | None:
    """The type of the weights that the first stage before this one started from; None where it is not known."""
    if job.start is None:
        return None
    if job.stage.start_from:
        return (read_json(Path(job.start, PRODUCT_MANIFEST)) or {}).get("checkpoint_type")
    if tensors := saved_tensors(Path(job.start)):
        return saved_type(tensors)
    settings = job.stage.model
    config = AutoConfig.from_pretrained(
        job.start, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    return str(config.dtype).removeprefix("torch.") if config.dtype else None


def _dtype(job: Job, checkpoint_type: str | None) -> torch.dtype | None:
    """What the finished model is saved in; None for what it was trained in, which a later stage goes on from."""
    wanted = job.stage.model.save_dtype
    if wanted == "auto":
        wanted = None if job.stage.taken_by else checkpoint_type
    return _TYPES.get(wanted)


def _say(job: Job, saved: Saved) -> None:
    """One line about the finished model, and one where a later stage does not start from what was trained."""
    size = f"model/: {saved.dtype}, {shown_bytes(saved.bytes)}"
    if saved.difference is None:
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
    before: Evaluation | None,
    after: Evaluation,
    saved: Saved | None,
) -> None:
    """Writes samples and, last of all, the result: a stage that has one is done."""
    questions, paths = measuring.held_out.questions, job.paths
    if questions is not None:
        answers_before = before.completions if before else [None] * len(questions.texts)
        rows = zip(questions.texts, answers_before, after.completions, strict=True)
        write_json_lines(paths.samples, [{"prompt": q, "before": b, "after": a} for q, b, a in rows])
    result: dict[str, Any] = {"steps": steps, "before": before.metrics if before else None, "after": after.metrics}
    result |= {"product": "model", "saved": asdict(saved)} if saved else {"product": "adapter"}
    if rehearsal := read_json(paths.rehearsal):
        result["rehearsal_s"] = rehearsal["seconds"]
    judge = JUDGES.get(job.stage.eval.judge)
    if judge and questions and before:
        result["win_rate"] = win_rate(judge, questions.texts, after.completions, before.completions)
    write_json(paths.result, result)
