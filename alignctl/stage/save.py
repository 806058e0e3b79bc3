"""What a stage leaves: its model, the samples, and last of all its result."""

from __future__ import annotations

from typing import Any

from alignctl.evaluate.evaluator import Evaluation
from alignctl.evaluate.judges import JUDGES, win_rate
from alignctl.models.loading import load_model
from alignctl.models.saving import save_finished
from alignctl.models.sharding import undivided, whole_state, whole_weights
from alignctl.run.files import read_json, write_json, write_json_lines
from alignctl.stage.job import Job
from alignctl.stage.measure import Measuring
from alignctl.trainers.base.managed import StageTrainer


def save(job: Job, trainer: StageTrainer, measuring: Measuring, before: Evaluation | None, after: Evaluation) -> None:
    """Saves the trained model, then samples and result; all processes call it together."""
    job.progress.phase("saving model")
    stage, trained = job.stage, trainer.trained_model
    with whole_weights(trainer.model_wrapped):
        facts = measuring.facts()
    state = whole_state(trained)
    if trainer.is_world_process_zero():
        with undivided():
            save_finished(
                trained,
                job.tokenizer,
                job.paths,
                lambda: load_model(
                    stage.model, job.method.trained, job.start, job.tokenizer, {"type": "lora"}, stage.seed
                ),
                facts,
                state,
            )
        _write_result(job, trainer.state.global_step, measuring, before, after)
    trainer.accelerator.wait_for_everyone()


def _write_result(job: Job, steps: int, measuring: Measuring, before: Evaluation | None, after: Evaluation) -> None:
    """Writes samples and, last of all, the result: a stage that has one is done."""
    questions, paths = measuring.held_out.questions, job.paths
    if questions is not None:
        answers_before = before.completions if before else [None] * len(questions.texts)
        rows = zip(questions.texts, answers_before, after.completions, strict=True)
        write_json_lines(paths.samples, [{"prompt": q, "before": b, "after": a} for q, b, a in rows])
    result: dict[str, Any] = {"steps": steps, "before": before.metrics if before else None, "after": after.metrics}
    if rehearsal := read_json(paths.rehearsal):
        result["rehearsal_s"] = rehearsal["seconds"]
    judge = JUDGES.get(job.stage.eval.judge)
    if judge and questions and before:
        result["win_rate"] = win_rate(judge, questions.texts, after.completions, before.completions)
    write_json(paths.result, result)
