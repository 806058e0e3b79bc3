"""What stands in for a stage's models while its rows alone are looked at: one layer with random weights, on the CPU.

A trainer tokenises, cuts and drops rows as it is built, and its model has no part in that but for the length it can see
and the tokens that end an answer. So the stage's own trainer is built, on a model of a few thousand weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from alignctl.config.schema import DistributedSettings, LauncherSettings, ModelSettings
from alignctl.config.stages import StageConfig
from alignctl.config.trl_fields import config_fields
from alignctl.data.rows import Rows
from alignctl.methods.registry import methods
from alignctl.models.loading import load_config
from alignctl.models.vocabulary import rows_needed
from alignctl.stage.build import build_trainer
from alignctl.stage.job import Job
from alignctl.trainers.base.managed import StageTrainer

_SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_ON_THE_CPU = {
    "bf16": False, "fp16": False, "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False, "compile": "off",
    "torch_compile": False, "optim": "adamw_torch", "optim_target_modules": None, "use_liger_kernel": False,
    "activation_offloading": False, "activation_checkpointing": False, "gradient_checkpointing": None,
    "dataloader_num_workers": 0, "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False,
    "generation": "transformers", "use_vllm": None, "sharing": "separate",
}  # fmt: skip
_WITHOUT_TRAINING = {
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": None,
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "push_to_hub": False, "warmup_steps": 0,
    "precompute_ref_log_probs": False, "sync_ref_model": False, "router_aux_loss_coef": None, "reward_weights": None,
    "normalize_rewards": "running",
}  # fmt: skip
_REWARD = [{"repetition": 3, "name": "none"}]  # which looks at nothing of a row


def without_models(stage: StageConfig, tokenizer: str | None = None) -> StageConfig:
    """A stage as this process builds it: nothing loaded, trained, measured or told to anybody.

    Args:
        tokenizer: Folder of that which an earlier stage is going to leave.
    """
    known = config_fields(methods()[stage.method].config_class)
    stands = _ON_THE_CPU | _WITHOUT_TRAINING | {"reward_funcs": _REWARD}
    # As many rows belong together in a step as with all processes.
    steps = int(stage.trainer.get("gradient_accumulation_steps", 1)) * stage.launcher.world_size
    fields = stage.trainer | {key: value for key, value in stands.items() if key in known}
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, tokenizer=tokenizer or stage.model.tokenizer),
        peft={"type": "none"},
        distributed=DistributedSettings(),
        launcher=LauncherSettings(processes=1),
        trainer=fields | {"gradient_accumulation_steps": steps},
    )


def trainer_of(job: Job, rows: Rows, held_rows: Rows | None, config: PretrainedConfig | None) -> StageTrainer:
    """The trainer of a stage, with rows as it trains on them.

    Args:
        job: Of a stage `without_models`.
        config: Of the model that is going to be trained; None where nothing is known of it.
    """
    folder = str(job.paths.root / "standing_in")
    _write(folder, job.tokenizer, config, job.stage.model)
    sources = dict.fromkeys(job.method.roles, folder)
    if job.method.trained != "reward_model":
        sources.pop("reward_model", None)
    model = ModelSettings(path=folder, dtype="float32")
    return build_trainer(
        dataclasses.replace(
            job,
            stage=dataclasses.replace(job.stage, model=model),
            weights=dict.fromkeys(job.method.roles) | sources,
            new_tokens=(),
        ),
        rows,
        held_rows,
    )


def config_of(stage: StageConfig, source: str | None) -> PretrainedConfig:
    """What a model says of itself.

    Args:
        source: Folder or Hub id; None for random weights.

    Raises:
        AlignctlError: It cannot be had.
    """
    if source is None:
        assert stage.model.scratch is not None
        return AutoConfig.for_model(**stage.model.scratch["config"])
    return load_config(source, stage.model)


def _write(folder: str, tokenizer: Tokenizer, config: PretrainedConfig | None, settings: ModelSettings) -> None:
    text = config.get_text_config() if config is not None else None
    longest = getattr(text, "max_position_embeddings", None)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    small = LlamaConfig(
        vocab_size=rows_needed(tokenizer), num_key_value_heads=1, max_position_embeddings=longest, **_SIZE, **ids
    )
    model = LlamaForCausalLM(small)
    model.generation_config.eos_token_id = _ends(config, tokenizer, settings) or tokenizer.eos_token_id
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)


def _ends(config: PretrainedConfig | None, tokenizer: Tokenizer, settings: ModelSettings) -> Sequence[int]:
    """Ids that end an answer, as the model says."""
    if config is None:
        return []
    given = getattr(config.get_text_config(), "eos_token_id", None)
    if config.name_or_path:
        with suppress(OSError, ValueError):  # most models have no such file
            given = GenerationConfig.from_pretrained(config.name_or_path, revision=settings.revision).eos_token_id
    ids = given if isinstance(given, list) else [given]
    return [one for one in ids if one is not None and one < len(tokenizer)]
