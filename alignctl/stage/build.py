"""Builds the trainer of a stage: its settings, its models, its rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from alignctl.config.adapters import changes_base, has_adapter
from alignctl.config.schema import ZERO_STAGES, ModelSettings
from alignctl.config.secrets import mask_text
from alignctl.config.stages import StageConfig
from alignctl.data.joining import part_of
from alignctl.data.recast import as_kind
from alignctl.data.rows import Rows
from alignctl.errors import AlignctlError, RequestError, refused
from alignctl.methods.registry import Role, methods, resolve
from alignctl.models.adapters import load_score_adapter
from alignctl.models.adapting import check_merges, check_names
from alignctl.models.dividing import allow_fsdp_on_cpu
from alignctl.models.loading import build_peft_config, load_own_tokenizer, longest_seen
from alignctl.models.sharding import start_deepspeed_on_cpu
from alignctl.models.vocabulary import check_same_tokens, rows_to_train
from alignctl.monitor.callbacks import MetricsFile
from alignctl.monitor.enough import LogsEnough
from alignctl.run.files import read_json
from alignctl.run.paths import REWARD_STATISTICS, RunPaths, StagePaths
from alignctl.stage.generation import settle_generation
from alignctl.stage.job import Job
from alignctl.stage.models import load
from alignctl.trainers.base.columns import ROW_NUMBER
from alignctl.trainers.base.managed import StageTrainer

_WAIT_S = 24 * 3600


def left_to_rehearsal(stage: StageConfig) -> set[str]:
    """Fields of a stage that say how a step is computed, and are not given."""
    return {key for key in ("pass_tokens", "activation_checkpointing") if stage.trainer.get(key) in (None, "auto")}


def sees_gpu() -> bool:
    return torch.accelerator.is_available()


def build_arguments(stage: StageConfig, paths: StagePaths, found: Mapping[str, Any]) -> TrainingArguments:
    """The trainer's settings: the stage's, and what the run and the machine decide.

    Args:
        found: Fields that the stage leaves to its rehearsal, as far as that found any.
    """
    on_cpu = bool(stage.launcher.processes)
    gpu = torch.cuda.is_available() and not on_cpu
    kind = stage.distributed.type
    given = stage.trainer | {key: value for key, value in found.items() if key in left_to_rehearsal(stage)}
    # Trackers show them, and none is a secret that the trainer has a use for.
    given = {key: mask_text(value) if isinstance(value, str) else value for key, value in given.items()}
    decided: dict[str, Any] = {
        "output_dir": str(paths.checkpoints),
        "report_to": "none",  # monitor/trackers.py reports
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
    settings = {
        "seed": stage.seed,
        "bf16": gpu and torch.cuda.is_bf16_supported() and not given.get("fp16", False),
        "dataloader_pin_memory": gpu,
        "per_device_eval_batch_size": stage.eval.batch_size,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,  # it would show the mean of other losses in place of one that is no number
        # Processes wait for one that tokenises as long as that takes; the launcher sees to those that are stuck.
        "ddp_timeout": _WAIT_S,
        # Those of language models are constants, the same everywhere; DDP would send them in every step.
        "ddp_broadcast_buffers": False,
    }
    config_class = resolve(methods()[stage.method].config_class)
    with refused(f"the settings of `{stage.name}`"):
        args = config_class(**settings | given | decided)
    if kind == "fsdp2" and on_cpu:
        allow_fsdp_on_cpu()
    return args


def rows_to_train_on(job: Job) -> tuple[Rows, Rows | None]:
    """Rows and held-out rows as the kind that the method learns from."""
    kind = job.method.data_kind
    rows, held_rows = (
        part if part is None or part.format.kind == kind else as_kind(part, kind) for part in (job.rows, job.held_rows)
    )
    if kind == "feedback" and rows is not job.rows:
        pairs, single = len(job.rows.dataset), len(rows.dataset)
        job.progress.notice(f"{pairs:,} pairs are taken apart into {single:,} labelled completions")
    return rows, held_rows


def build_trainer(job: Job, rows: Rows, held_rows: Rows | None) -> StageTrainer:
    """The method's trainer with its models and rows."""
    stage, method = job.stage, job.method
    trained = _load(job, method.trained, alive=True)
    if has_adapter(stage.peft):
        check_names(trained, stage.peft)
    _check_length(stage, trained)
    settle_generation(job, trained)
    others: dict[str, Any] = {}
    for role, take in _TAKEN.items():
        if role in method.roles[1:]:
            others |= take(job, others)
    make = resolve(method.trainer)
    if method.mixes_rows and (reason := method.mixes_rows(vars(job.args))):
        others["keeps_batches"] = reason
    if stage.distributed.tp_size > 1:
        others["tp_size"] = stage.distributed.tp_size
    with refused("`peft`"):
        adapter = build_peft_config(stage.peft, method.trained, _token_rows(job, trained))
    with refused(f"the settings of `{stage.name}`"):
        trainer = make(
            model=trained,
            args=job.args,
            train_dataset=rows.dataset.add_column(ROW_NUMBER, rows.numbers),
            eval_dataset=held_rows and held_rows.dataset.add_column(ROW_NUMBER, held_rows.numbers),
            row_columns={column.name: column.number for column in rows.columns},
            processing_class=job.tokenizer,
            count_rows=partial(job.progress.count, "rows"),
            peft_config=adapter,
            callbacks=[LogsEnough(), MetricsFile(job.paths, job.progress.notice), job.stop, job.progress, job.trackers],
            **others,
        )
    if held_rows is not None and trainer.eval_dataset is not None:
        _settle_held_out(trainer, held_rows)
    if (together := stage.distributed.sp_size) > 1:
        trainer.compute_rows_together(together)
    if has_adapter(stage.peft) and not stage.leaves_adapter:
        check_merges(trainer.trained_model)
    trainer.show_samples, trainer.tell, trainer.stop = job.progress.samples, job.progress.notice, job.stop
    for notice in trainer.notices:
        job.progress.notice(notice)
    return trainer


def _settle_held_out(trainer: StageTrainer, rows: Rows) -> None:
    """Tells a trainer of which set each of its held-out rows is, where they are measured on by name.

    Raises:
        RequestError: It has made others of them.
    """
    held, numbered = trainer.eval_dataset, ROW_NUMBER in trainer.eval_dataset.column_names
    if any(part.name for part in rows.ledger.parts):
        if not numbered:
            raise RequestError(
                "`data.eval`: held-out rows that are packed are not measured by name", "set `eval_packing=false`"
            )
        of = part_of(rows.ledger, np.asarray(held[ROW_NUMBER]))
        trainer.held_out_sets = {
            part.name: np.flatnonzero(of == number).tolist() for number, part in enumerate(rows.ledger.parts)
        }
    if numbered:
        trainer.eval_dataset = held.remove_columns(ROW_NUMBER)


def _token_rows(job: Job, trained: PreTrainedModel) -> dict[str, list[int]] | None:
    """The embeddings that an adapter learns beside it.

    Raises:
        RequestError: There are some, and processes divide them.
    """
    stage = job.stage
    rows, kind = rows_to_train(trained, job.new_tokens, stage.peft), stage.distributed.type
    if rows and (ZERO_STAGES.get(kind) == 3 or kind == "fsdp2") and has_adapter(stage.peft):
        names = ",".join(rows)
        raise RequestError(
            f"peft cannot train the embeddings of `model.add_tokens` alone where `distributed={kind}` divides them",
            f"set `distributed=zero2`, or train all of them, `peft.modules_to_save=[{names}]`",
        )
    return rows


def _load(job: Job, role: Role, alive: bool = False) -> PreTrainedModel:
    """The model of a role; with `alive` its passes are counted, which says that the process goes on."""
    stage, progress = job.stage, job.progress
    with refused(f"the section `model` of `{stage.name}`"):
        if role == job.method.trained:
            model = load(job, role, job.start, trained=True, notice=progress.notice)
        else:
            model = load(job, role, job.weights[role])
    if alive:
        count = model.count_pass = partial(progress.count, "passes")  # as an attribute for passes that run no hooks
        if not stage.trainer.get("torch_compile"):
            model.get_input_embeddings().register_forward_pre_hook(lambda *_: count())
    return model


def _reference(job: Job, others: dict[str, Any]) -> dict[str, Any]:
    """An adapter switched off is the reference, where it leaves alone what is under it; so is the model itself before
    it is trained, where log-probabilities are computed beforehand. Nothing where the method does without."""
    source = job.weights["reference"]
    itself = source == job.start
    if source is not None and not itself and (theirs := _tokenizer_beside(source, job.stage.model)):
        check_same_tokens(job.tokenizer, theirs, source)
    if job.method.does_without_reference(job.stage.trainer):
        spared = True
    elif has_adapter(job.stage.peft):
        spared = itself and changes_base(job.stage.peft) is None
    else:
        spared = itself and job.stage.trainer.get("precompute_ref_log_probs")
    return {"ref_model": None if spared else _load(job, "reference", alive=True)}


def _tokenizer_beside(source: str, settings: ModelSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reference; None where there are weights alone, of which the sizes are compared."""
    try:
        return load_own_tokenizer(source, settings)
    except AlignctlError:
        return None


def _reward_model(job: Job, others: dict[str, Any]) -> dict[str, Any]:
    """The model or its adapter, its own tokenizer, and how its scores are distributed. Nothing where the stage names
    none."""
    stage, folder = job.stage, job.weights.get("reward_model")
    if not folder:
        return {}
    tokenizer = load_own_tokenizer(folder, stage.model)
    taken: dict[str, Any] = {
        "reward_processing_class": tokenizer,
        "reward_statistics": read_json(Path(folder, REWARD_STATISTICS)),
    }
    if stage.takes_adapter("reward_model"):
        taken["reward_adapter"] = load_score_adapter(folder, job.weights["policy"])
    else:
        taken["reward_model"] = load(job, "reward_model", folder, tokenizer=tokenizer)
    return taken


def _value_model(job: Job, others: dict[str, Any]) -> dict[str, Any]:
    """Where it is one by itself: from the reward model's weights if that reads the same tokens."""
    stage = job.stage
    if stage.trainer.get("sharing", "separate") != "separate":
        return {}
    start = job.weights["value_model"]
    if "reward_model" in others and not _values_start_as(others, job.tokenizer):
        start = job.weights["policy"]
        job.progress.notice("the value model starts from the policy: the reward model has other tokens")
    return {"value_model": load(job, "value_model", start, trained=True)}


def _values_start_as(reward: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    same_tokens = reward["reward_processing_class"].get_vocab() == tokenizer.get_vocab()
    return same_tokens and hasattr(reward["reward_model"], "score")


_TAKEN = {"reward_model": _reward_model, "value_model": _value_model, "reference": _reference}
"""What a trainer takes of each role that it does not train: keyword arguments, from the job and those of the roles
before it."""


def _check_length(stage: StageConfig, model: PreTrainedModel) -> None:
    limit = longest_seen(model)
    wanted = stage.trainer.get("max_length")
    if limit and wanted and wanted > limit:
        raise RequestError(
            f"`{stage.name}.max_length={wanted}` is longer than the model can see: {limit} tokens",
            f"set `{stage.name}.max_length={limit}`",
        )
