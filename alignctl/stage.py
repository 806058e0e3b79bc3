"""One stage: load, measure, train, measure, save. Run by worker.py in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from alignctl.config.stages import StageConfig
from alignctl.data.reading import Rows, as_plain_text, read_split
from alignctl.errors import RequestError, Stopped
from alignctl.evaluate.judges import JUDGES, win_rate
from alignctl.evaluate.measure import Evaluation, Pairs, Questions, Reference, measure
from alignctl.methods.registry import Method, methods, resolve
from alignctl.models.loading import build_peft_config, load_model, load_tokenizer, save_finished
from alignctl.monitor.callbacks import MetricsFile, ProgressFile, StopOnRequest
from alignctl.monitor.stopping import StopSignal
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json, write_json_lines
from alignctl.run.paths import StagePaths
from alignctl.trainers.checkpointing import CompleteCheckpoints


@dataclass
class HeldOut:
    """What a stage is measured on; parts are None where there are no such rows or they are not wanted."""

    pairs: Pairs | None
    questions: Questions | None


def run_stage(stage: StageConfig, start: str | None, paths: StagePaths, signal: StopSignal) -> None:
    """Runs a stage to its result, continuing from its newest complete checkpoint if there is one.

    Args:
        start: Folder or Hub id of the weights; None for random ones.
        signal: Looked at at the end of every optimizer step.

    Raises:
        Stopped: Training was stopped on request; its checkpoint continues it.
        AlignctlError: Something the user can mend.
    """
    method = methods()[stage.method]
    progress = ProgressFile(paths, method.key_metrics)
    progress.phase("reading data")
    rows, held_rows = read_split(stage.data, method.data_kind, stage.seed)
    progress.phase("loading model")
    tokenizer = load_tokenizer(stage.model, start, texts=lambda: _texts(rows.dataset))
    if tokenizer.chat_template is None:
        where = start or "the stage"
        rows = as_plain_text(rows, where)
        held_rows = held_rows and as_plain_text(held_rows, where)
    stop = StopOnRequest(signal)
    trainer = _build_trainer(stage, method, start, tokenizer, rows, held_rows, paths, [progress, stop])
    _write_ledgers(stage, paths, trainer, rows, held_rows)
    held_out = _held_out(stage, method, trainer, tokenizer, held_rows)

    def evaluate(reference: Reference | None) -> Evaluation:
        with _random_state_kept():
            evaluation = measure(
                trainer.model, reference, tokenizer, held_out.pairs, held_out.questions,
                JUDGES.get(stage.eval.judge), stage.eval, stage.seed,
            )  # fmt: skip
            if trainer.eval_dataset is not None and held_out.pairs is None:
                evaluation.metrics["loss"] = trainer.evaluate()["eval_loss"]
        return evaluation

    before = None
    if start is not None:  # random weights are not worth measuring
        progress.phase("measuring before")
        before = _once(paths, lambda: evaluate(None))
        if "reference" in method.roles and held_out.questions:
            before.metrics["kl"] = 0.0  # it is the reference
    _train(trainer, stop, paths)
    progress.phase("measuring after")
    after = evaluate(_reference(trainer, stage, start, tokenizer) if "reference" in method.roles else None)
    progress.phase("saving model")
    save_finished(trainer.accelerator.unwrap_model(trainer.model), tokenizer, paths.model, paths.adapter)
    _write_result(stage, paths, trainer.state.global_step, held_out.questions, before, after)


def _build_trainer(
    stage: StageConfig,
    method: Method,
    start: str | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_rows: Rows | None,
    paths: StagePaths,
    callbacks: list[Any],
) -> Trainer:
    """The method's trainer with its models, data, and alignctl's checkpoints."""
    peft_config = build_peft_config(stage.peft)

    def load() -> PreTrainedModel:
        return load_model(stage.model, start, tokenizer, peft_config is None, stage.seed)

    policy = load()
    _check_length(stage, policy)
    roles: dict[str, Any] = {}
    if "reference" in method.roles:
        # An adapter switched off is the reference; so are log-probabilities computed beforehand.
        alone = peft_config is not None or stage.trainer.get("precompute_ref_log_probs")
        roles["ref_model"] = None if alone else load()

    trainer_class = resolve(method.trainer)
    complete = type(f"Alignctl{trainer_class.__name__}", (CompleteCheckpoints, trainer_class), {})
    return complete(
        model=policy,
        args=resolve(method.config_class)(**_arguments(stage, paths)),
        train_dataset=rows.dataset,
        eval_dataset=held_rows.dataset if held_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[MetricsFile(paths), *callbacks],
        **roles,
    )


def _write_ledgers(stage: StageConfig, paths: StagePaths, trainer: Trainer, rows: Rows, held_rows: Rows | None) -> None:
    """What became of all rows, those included whose prompt leaves no room for a completion: TRL drops them."""
    ledgers = {}
    for part, given, used in (("train", rows, trainer.train_dataset), ("eval", held_rows, trainer.eval_dataset)):
        if given is not None:
            too_long = 0 if stage.trainer.get("packing") else len(given.dataset) - len(used)
            ledgers[part] = asdict(given.ledger) | {"too_long": too_long}
    write_json(paths.data, ledgers)


def _arguments(stage: StageConfig, paths: StagePaths) -> dict[str, Any]:
    """Arguments of the trainer's config class: the stage's, and what the run and the machine decide."""
    gpu = torch.cuda.is_available()
    given = stage.trainer
    return {
        "seed": stage.seed,
        "bf16": gpu and torch.cuda.is_bf16_supported() and not given.get("fp16", False),
        "dataloader_pin_memory": gpu,
        "per_device_eval_batch_size": stage.eval.batch_size,
        "prediction_loss_only": True,
        **given,
        "output_dir": str(paths.checkpoints),
        "report_to": stage.report_to,
        "disable_tqdm": True,
    }


def _check_length(stage: StageConfig, policy: PreTrainedModel) -> None:
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    wanted = stage.trainer.get("max_length")
    if limit and wanted and wanted > limit:
        raise RequestError(
            f"`{stage.name}.max_length={wanted}` is longer than the model can see: {limit} tokens",
            f"set `{stage.name}.max_length={limit}`",
        )


def _texts(dataset: Dataset) -> Iterator[str]:
    """All text of the rows, to train a tokenizer on."""
    for row in dataset:
        for value in row.values():
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value)


def _held_out(
    stage: StageConfig,
    method: Method,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    held_rows: Rows | None,
) -> HeldOut:
    """Held-out rows as token ids: pairs as the trainer sees them, prompts as a policy is asked."""
    if held_rows is None:
        return HeldOut(None, None)
    pairs = None
    if method.data_kind == "preferences":
        longest = trainer.args.max_length
        cut = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.eval_dataset]
        pairs = Pairs(
            prompts=[prompt for prompt, _, _ in cut],
            chosen=[_cut(prompt, chosen, longest) for prompt, chosen, _ in cut],
            rejected=[_cut(prompt, rejected, longest) for prompt, _, rejected in cut],
        )
    return HeldOut(pairs, _questions(stage, tokenizer, held_rows, trainer) if stage.eval.prompts else None)


def _cut(prompt: list[int], completion: list[int], longest: int | None) -> list[int]:
    """A completion cut where the trainer cuts it."""
    return completion if longest is None else completion[: max(longest - len(prompt), 0)]


def _questions(
    stage: StageConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows, trainer: Trainer
) -> Questions | None:
    """Distinct held-out prompts that leave room for an answer."""
    if "prompt" not in rows.dataset.column_names:
        return None
    limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    room = limit - stage.eval.max_new_tokens if limit else None
    questions, seen = Questions([], []), set()
    for prompt in rows.dataset["prompt"]:
        if isinstance(prompt, str):
            text, ids = prompt, tokenizer(prompt)["input_ids"]
        else:
            text = prompt[-1]["content"]
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if ids and tuple(ids) not in seen and (room is None or len(ids) <= room):
            seen.add(tuple(ids))
            questions.texts.append(text)
            questions.prompts.append(ids)
        if len(questions.prompts) == stage.eval.prompts:
            break
    return questions if questions.prompts else None


def _reference(
    trainer: Trainer, stage: StageConfig, start: str | None, tokenizer: PreTrainedTokenizerBase
) -> Reference:
    """The reference the policy was trained against: the adapter off, the model beside it, or the start loaded again."""
    policy = trainer.accelerator.unwrap_model(trainer.model)

    @contextmanager
    def reference() -> Iterator[PreTrainedModel]:
        if isinstance(policy, PeftModel):
            with policy.disable_adapter():
                yield policy
        elif trainer.ref_model is not None:
            yield trainer.accelerator.unwrap_model(trainer.ref_model)
        else:
            model = load_model(stage.model, start, tokenizer, True, stage.seed).to(policy.device).eval()
            yield model

    return reference


def _train(trainer: Trainer, stop: StopOnRequest, paths: StagePaths) -> None:
    """Trains from the newest complete checkpoint, or from the start."""
    checkpoint = newest_checkpoint(paths.checkpoints)
    if checkpoint and read_json(checkpoint.path / "trainer_state.json")["max_steps"] <= checkpoint.step:
        # Training had ended, its result was not saved. transformers would take one step more.
        trainer._load_from_checkpoint(str(checkpoint.path))
        trainer.state.global_step = checkpoint.step
        return
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if stop.stopped:
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is saved"
        )


def _once(paths: StagePaths, evaluate: Callable[[], Evaluation]) -> Evaluation:
    """The evaluation before training; kept on disk, so that a run that is continued need not repeat it."""
    kept = read_json(paths.evaluation_before)
    if kept is not None:
        return Evaluation(**kept)
    evaluation = evaluate()
    write_json(paths.evaluation_before, asdict(evaluation))
    return evaluation


def _write_result(
    stage: StageConfig,
    paths: StagePaths,
    steps: int,
    questions: Questions | None,
    before: Evaluation | None,
    after: Evaluation,
) -> None:
    """Writes samples and, last of all, the result: a stage that has one is done."""
    if questions is not None:
        answers_before = before.completions if before else [None] * len(questions.texts)
        rows = zip(questions.texts, answers_before, after.completions, strict=True)
        write_json_lines(paths.samples, [{"prompt": q, "before": b, "after": a} for q, b, a in rows])
    result: dict[str, Any] = {"steps": steps, "before": before.metrics if before else None, "after": after.metrics}
    judge = JUDGES.get(stage.eval.judge)
    if judge and questions and before:
        result["win_rate"] = win_rate(judge, questions.texts, after.completions, before.completions)
    write_json(paths.result, result)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leaves every source of randomness as it was, so that measuring changes nothing about training."""
    python, arrays, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(torch_cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
