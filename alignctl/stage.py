"""One stage: load, measure, train, measure, save. Run by worker.py in a process of its own."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from alignctl.config.schema import ZERO_STAGES
from alignctl.config.stages import StageConfig
from alignctl.data.reading import Rows, as_kind, read_split
from alignctl.engine.forward import takes_packed_rows
from alignctl.errors import LaunchError, RequestError, Stopped
from alignctl.evaluate.held_out import Cut, HeldOut, build_feedback, build_pairs, build_questions, cutter
from alignctl.evaluate.judges import JUDGES, win_rate
from alignctl.evaluate.measure import Evaluation, Reference, measure
from alignctl.evaluate.reward_model import REWARD_STATISTICS, measure_reward_model, reward_statistics
from alignctl.methods.registry import Method, Role, methods, resolve
from alignctl.models.adapters import Adapters, load_score_adapter
from alignctl.models.attention import put_packed_attention_on
from alignctl.models.loading import build_peft_config, load_model, load_reward_tokenizer, load_tokenizer, save_finished
from alignctl.models.sharding import start_deepspeed_on_cpu, undivided, whole_state, whole_weights
from alignctl.monitor.callbacks import MetricsFile, ProgressFile, StopOnRequest
from alignctl.monitor.heartbeat import Heartbeat, RehearsalHeartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.run.files import read_json, write_json, write_json_lines
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.stage_rehearsal import STEPS, longest, rehearsed, scratch, wants_rehearsal
from alignctl.stage_rows import texts_of, trained_model, write_ledgers, write_rows
from alignctl.stage_training import check_room, full_disk_explained, held_out_loss, train
from alignctl.trainers.base.not_finite import ROW_NUMBER

Weights = Mapping[Role, str | None]
"""Folder or Hub id of each role's weights; None for random ones."""

_STATISTICS_ROWS = 256
_WAIT_S = 24 * 3600


def run_stage(stage: StageConfig, weights: Weights, paths: StagePaths, signal: StopSignal) -> None:
    """Runs a stage to its result, continuing from its newest complete checkpoint if there is one.

    Args:
        weights: Of the method's roles, the trained one first.
        signal: Looked at at the end of every optimizer step.

    Raises:
        Stopped: Training was stopped on request; its checkpoint continues it.
        AlignctlError: Something the user can mend.
    """
    with full_disk_explained(paths):
        _run(stage, weights, paths, signal)


def _run(stage: StageConfig, weights: Weights, paths: StagePaths, signal: StopSignal) -> None:
    method = methods()[stage.method]
    start = weights[method.trained]
    _check_gpus(stage)
    heartbeat = Heartbeat(paths, _rank())
    progress = ProgressFile(paths, method.key_metrics, heartbeat, is_first=_rank() == 0)
    progress.phase("reading data")
    rows, held_rows = read_split(stage.data, method.data_kind, stage.seed, with_margin=method.takes_margin)
    progress.phase("loading model")
    tokenizer = load_tokenizer(stage.model, start, texts=lambda: texts_of(rows.dataset))
    rows, held_rows = (part and write_rows(part, tokenizer, start, stage, progress) for part in (rows, held_rows))
    args = _arguments(stage, method, paths)
    if wants_rehearsal(stage, paths, args, len(rows.dataset)):
        _rehearse(stage, weights, tokenizer, args, rows, held_rows, paths, progress, heartbeat, signal)
    _work(stage, weights, tokenizer, rows, held_rows, paths, progress, StopOnRequest(signal))


def _check_gpus(stage: StageConfig) -> None:
    """Whether the GPUs that were asked for are seen: training on the CPU beside them would be a costly mistake.

    Raises:
        LaunchError: They are not.
    """
    if stage.launcher.gpus_per_node and not stage.trainer.get("use_cpu") and not torch.accelerator.is_available():
        raise LaunchError(
            f"`launcher.gpus_per_node={stage.launcher.gpus_per_node}`, and torch sees no GPU",
            "look at the driver, at torch's build (`torch.version.cuda`), and at the container's options (`--nv`)",
        )


def _rehearse(
    stage: StageConfig,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    rows: Rows,
    held_rows: Rows | None,
    paths: StagePaths,
    progress: ProgressFile,
    heartbeat: Heartbeat,
    signal: StopSignal,
) -> None:
    """Does the whole stage in small, and says what that took.

    Raises:
        KeyboardInterrupt: A stop was requested; there is nothing to continue from.
        AlignctlError: As the stage itself would, later.
    """
    progress.phase("rehearsing")
    began = time.monotonic()
    some = longest(rows, tokenizer, args)
    held = held_rows and longest(held_rows, tokenizer, args, count=2 * stage.eval.batch_size)
    with scratch(paths) as there, full_disk_explained(there), _random_state_kept():
        quiet = ProgressFile(there, (), RehearsalHeartbeat(heartbeat), is_first=_rank() == 0)
        try:
            _work(rehearsed(stage), weights, tokenizer, some, held, there, quiet, StopOnRequest(signal), twice=True)
        except Stopped as error:
            raise KeyboardInterrupt from error
    seconds = round(time.monotonic() - began, 1)
    progress.notice(f"rehearsed in {seconds:g} s: {STEPS} steps on the longest rows, measured, saved and loaded back")
    if PartialState().is_main_process:
        write_json(paths.rehearsal, {"seconds": seconds})


def _work(
    stage: StageConfig,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_rows: Rows | None,
    paths: StagePaths,
    progress: ProgressFile,
    stop: StopOnRequest,
    twice: bool = False,
) -> None:
    """The stage on rows as its tokenizer can write them.

    Args:
        twice: Goes to the end of training a second time, which loads the last checkpoint.
    """
    method = methods()[stage.method]
    start = weights[method.trained]
    examples, held_examples = rows, held_rows
    if rows.format.kind != method.data_kind:
        examples, held_examples = (part and as_kind(part, method.data_kind) for part in (rows, held_rows))
        if method.data_kind == "feedback":
            progress.notice(
                f"{len(rows.dataset):,} pairs are taken apart into {len(examples.dataset):,} labelled completions"
            )
    trainer = _build_trainer(stage, method, weights, tokenizer, examples, held_examples, paths, progress, stop)
    write_ledgers(stage, paths, trainer, examples, held_examples)
    check_room(trainer, stage, paths)  # before anything is written that other settings would spoil
    held_out = _held_out(stage, method, trainer, tokenizer, held_rows)

    def evaluate(reference: Reference | None) -> Evaluation:
        with _random_state_kept(), whole_weights(trainer.model_wrapped, getattr(trainer, "ref_model", None)):
            evaluation = _measure(stage, method, trainer, tokenizer, held_out, reference)
            if trainer.eval_dataset and held_out.pairs is None:
                evaluation.metrics["loss"] = held_out_loss(trainer)
        return evaluation

    before = None
    if start is not None:  # random weights are not worth measuring
        progress.phase("measuring before")
        itself = weights.get("reference") in (start, None)
        before = _once(paths, lambda: evaluate(None if itself else _reference(trainer, stage, weights, tokenizer)))
        if "reference" in method.roles and itself and held_out.questions:
            before.metrics["kl"] = 0.0
    for _ in range(2 if twice else 1):
        train(trainer, stage, paths, stop, progress)
    progress.phase("measuring after")
    after = evaluate(_reference(trainer, stage, weights, tokenizer) if "reference" in method.roles else None)
    progress.phase("saving model")
    with whole_weights(trainer.model_wrapped):
        facts = _facts(stage, trainer, tokenizer, rows, held_out, method)
    state = whole_state(trained_model(trainer))
    if trainer.is_world_process_zero():
        with undivided():
            save_finished(
                trained_model(trainer),
                tokenizer,
                paths.model,
                paths.adapter,
                lambda: load_model(stage.model, method.trained, start, tokenizer, {"type": "lora"}, stage.seed),
                facts,
                state,
            )
        _write_result(stage, paths, trainer.state.global_step, held_out, before, after)
    trainer.accelerator.wait_for_everyone()


def _build_trainer(
    stage: StageConfig,
    method: Method,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_rows: Rows | None,
    paths: StagePaths,
    progress: ProgressFile,
    stop: StopOnRequest,
) -> Trainer:
    """The method's trainer with its models, data, and alignctl's checkpoints."""
    # Made before any model is loaded: under ZeRO-3 they say that weights are to be divided as they are read.
    args = _arguments(stage, method, paths)
    peft_config = build_peft_config(stage.peft, method.trained)

    def load(role: Role) -> PreTrainedModel:
        model = load_model(stage.model, role, weights[role], tokenizer, stage.peft, stage.seed)
        if not stage.trainer.get("torch_compile"):
            model.get_input_embeddings().register_forward_pre_hook(lambda *_: progress.alive())
        return model

    trained = load(method.trained)
    _check_length(stage, trained)
    roles: dict[str, Any] = {}
    if "reward_model" in method.roles[1:]:
        roles |= _reward_model(stage, weights)
    if "value_model" in method.roles:
        roles |= _value_model(stage, weights, tokenizer, roles, progress)
    if "reference" in method.roles:
        # An adapter switched off is the reference; so is the model itself before it is trained, where log-probabilities
        # are computed beforehand.
        itself = weights["reference"] == weights[method.trained]
        spared = itself and (peft_config is not None or stage.trainer.get("precompute_ref_log_probs"))
        roles["ref_model"] = None if spared else load("reference")
    trainer = resolve(method.trainer)(
        model=trained,
        args=args,
        train_dataset=rows.dataset.add_column(ROW_NUMBER, rows.numbers),
        eval_dataset=held_rows.dataset if held_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[MetricsFile(paths), stop, progress],
        **roles,
    )
    if hasattr(trainer, "show_samples"):
        trainer.show_samples = progress.samples
    for notice in trainer.notices:
        progress.notice(notice)
    return trainer


def _reward_model(stage: StageConfig, weights: Weights) -> dict[str, Any]:
    """What a trainer takes of a reward model that it does not train: the model or its adapter, its own tokenizer, and
    how its scores are distributed. Nothing where the stage names none."""
    folder = weights.get("reward_model")
    if not folder:
        return {}
    tokenizer = load_reward_tokenizer(folder, stage.model)
    taken: dict[str, Any] = {
        "reward_processing_class": tokenizer,
        "reward_statistics": read_json(Path(folder, REWARD_STATISTICS)),
    }
    if stage.trainer.get("roles") == "shared_base":
        taken["reward_adapter"] = load_score_adapter(folder, weights["policy"])
    else:
        taken["reward_model"] = load_model(stage.model, "reward_model", folder, tokenizer, stage.peft, stage.seed)
    return taken


def _value_model(
    stage: StageConfig,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    reward: Mapping[str, Any],
    progress: ProgressFile,
) -> dict[str, Any]:
    """The value model, where it is one by itself: from the reward model's weights if that reads the same tokens."""
    if stage.trainer.get("roles", "separate") != "separate":
        return {}
    start = weights["value_model"]
    if "reward_model" in reward:
        same_tokens = reward["reward_processing_class"].get_vocab() == tokenizer.get_vocab()
        if not same_tokens or not hasattr(reward["reward_model"], "score"):
            start = weights["policy"]
            progress.notice("the value model starts from the policy: the reward model has other tokens")
    return {"value_model": load_model(stage.model, "value_model", start, tokenizer, stage.peft, stage.seed)}


def _rank() -> int:
    """Which of the run's processes this is; known before they have found each other."""
    return int(os.environ.get("RANK", 0))


def _arguments(stage: StageConfig, method: Method, paths: StagePaths) -> TrainingArguments:
    """The trainer's settings: the stage's, and what the run and the machine decide."""
    on_cpu = bool(stage.launcher.processes)
    gpu = torch.cuda.is_available() and not on_cpu
    kind, given = stage.distributed.type, stage.trainer
    decided: dict[str, Any] = {
        "output_dir": str(paths.checkpoints),
        "report_to": stage.report_to,
        "disable_tqdm": True,
    }
    if on_cpu:
        decided["use_cpu"] = True
    if kind in ZERO_STAGES:
        decided["deepspeed"] = str(RunPaths(paths.root.parent).deepspeed)
        if on_cpu:
            start_deepspeed_on_cpu()
    elif kind == "fsdp2":
        decided |= {"fsdp": True, "fsdp_config": {"version": 2}}
    return resolve(method.config_class)(
        **{
            "seed": stage.seed,
            "bf16": gpu and torch.cuda.is_bf16_supported() and not given.get("fp16", False),
            "dataloader_pin_memory": gpu,
            "per_device_eval_batch_size": stage.eval.batch_size,
            "prediction_loss_only": True,
            "logging_nan_inf_filter": False,  # it would show the mean of other losses in place of one that is no number
            # Processes wait for one that tokenises as long as that takes; the launcher sees to those that are stuck.
            "ddp_timeout": _WAIT_S,
        }
        | given
        | decided
    )


def _check_length(stage: StageConfig, model: PreTrainedModel) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = stage.trainer.get("max_length")
    if limit and wanted and wanted > limit:
        raise RequestError(
            f"`{stage.name}.max_length={wanted}` is longer than the model can see: {limit} tokens",
            f"set `{stage.name}.max_length={limit}`",
        )


def _held_out(
    stage: StageConfig,
    method: Method,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    held_rows: Rows | None,
) -> HeldOut:
    """Held-out rows as token ids: completions as the trainer sees them, prompts as a policy is asked."""
    if held_rows is None:
        return HeldOut()
    cut, is_policy = _cutter(trainer, method), method.trained == "policy"
    kind, dataset = held_rows.format.kind, held_rows.dataset
    limit = getattr(trained_model(trainer).config.get_text_config(), "max_position_embeddings", None)
    room = limit - stage.eval.max_new_tokens if limit else None
    asks = is_policy and stage.eval.prompts and "prompt" in dataset.column_names
    return HeldOut(
        pairs=build_pairs(dataset, tokenizer, cut) if kind == "preferences" else None,
        feedback=build_feedback(dataset, tokenizer, cut) if kind == "feedback" else None,
        questions=build_questions(dataset["prompt"], tokenizer, stage.eval.prompts, room) if asks else None,
    )


def _cutter(trainer: Trainer, method: Method) -> Cut:
    """TRL's trainers of policies cut what is too long, that of reward models leaves it out."""
    mode = getattr(trainer.args, "truncation_mode", "keep_start")
    longest = getattr(trainer.args, "max_length", None)
    if longest is None:
        longest = getattr(trained_model(trainer).config.get_text_config(), "max_position_embeddings", None)
    return cutter(longest, mode, drops_longer=method.trained == "reward_model")


def _measure(
    stage: StageConfig,
    method: Method,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    reference: Reference | None,
) -> Evaluation:
    if method.trained == "policy":
        judge = JUDGES.get(stage.eval.judge)
        return measure(trained_model(trainer), reference, tokenizer, held_out, judge, stage.eval, stage.seed)
    if held_out.pairs is None:
        return Evaluation()
    return Evaluation(measure_reward_model(trainer.model, held_out.pairs, stage.eval.batch_size))


def _facts(
    stage: StageConfig,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_out: HeldOut,
    method: Method,
) -> dict[str, Any]:
    """What is saved beside a model's weights: of a reward model, how its scores are distributed."""
    if method.trained != "reward_model":
        return {}
    pairs, source = held_out.pairs, "held-out pairs"
    if pairs is None:
        some = rows.dataset.select(range(min(len(rows.dataset), _STATISTICS_ROWS)))
        pairs, source = build_pairs(some, tokenizer, _cutter(trainer, method)), "training pairs"
    assert pairs is not None  # the trainer had rows
    statistics = reward_statistics(trainer.model, pairs, stage.eval.batch_size)
    return {REWARD_STATISTICS: asdict(statistics) | {"source": source}}


def _reference(trainer: Trainer, stage: StageConfig, weights: Weights, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """The reference the policy was trained against: a model beside it, the adapter off, or its weights loaded again."""
    policy = trained_model(trainer)

    @contextmanager
    def reference() -> Iterator[PreTrainedModel]:
        if trainer.ref_model is not None:
            yield trainer.accelerator.unwrap_model(trainer.ref_model)
        elif isinstance(policy, PeftModel) and weights["reference"] == weights["policy"]:
            with Adapters(policy).under(None):
                yield policy
        else:
            model = load_model(stage.model, "reference", weights["reference"], tokenizer, stage.peft, stage.seed)
            if takes_packed_rows(policy):
                put_packed_attention_on(model, policy.device)
            yield model.to(policy.device).eval()

    return reference


def _once(paths: StagePaths, evaluate: Callable[[], Evaluation]) -> Evaluation:
    """The evaluation before training; kept on disk, so that a run that is continued need not repeat it."""
    kept = read_json(paths.evaluation_before)
    if kept is not None:
        return Evaluation(**kept)
    evaluation = evaluate()
    if _rank() == 0:
        write_json(paths.evaluation_before, asdict(evaluation))
    return evaluation


def _write_result(
    stage: StageConfig,
    paths: StagePaths,
    steps: int,
    held_out: HeldOut,
    before: Evaluation | None,
    after: Evaluation,
) -> None:
    """Writes samples and, last of all, the result: a stage that has one is done."""
    questions = held_out.questions
    if questions is not None:
        answers_before = before.completions if before else [None] * len(questions.texts)
        rows = zip(questions.texts, answers_before, after.completions, strict=True)
        write_json_lines(paths.samples, [{"prompt": q, "before": b, "after": a} for q, b, a in rows])
    result: dict[str, Any] = {"steps": steps, "before": before.metrics if before else None, "after": after.metrics}
    if rehearsal := read_json(paths.rehearsal):
        result["rehearsal_s"] = rehearsal["seconds"]
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
