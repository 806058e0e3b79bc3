"""Loads tokenizers and models for the roles of a stage, and saves the finished one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from alignctl.config.schema import PEFT_CLASSES, ModelSettings
from alignctl.errors import AlignctlError
from alignctl.methods.registry import resolve
from alignctl.models.tokenizer import train_tokenizer


def load_tokenizer(
    settings: ModelSettings, start: str | None, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer a stage starts with, or trains one on `texts()` for a model from scratch.

    Args:
        start: Folder or Hub id the weights come from; None for random weights.
    """
    if start is None and settings.tokenizer is None:
        assert settings.scratch is not None
        return train_tokenizer(texts(), settings.scratch["vocab_size"])
    source = settings.tokenizer or start
    tokenizer = _from_pretrained(AutoTokenizer, source, settings)
    if settings.chat_template:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: ModelSettings, start: str | None, tokenizer: PreTrainedTokenizerBase, trains_all_weights: bool, seed: int
) -> PreTrainedModel:
    """Loads a causal language model, or makes one with random weights.

    With `dtype: auto` the weights keep the checkpoint's type, unless all of them are trained: then they are float32,
    because small updates are lost in 16 bits (mixed precision comes from the stage's `bf16`).
    """
    dtype = (
        getattr(torch, settings.dtype) if settings.dtype != "auto" else torch.float32 if trains_all_weights else "auto"
    )
    options = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    if start is None:
        assert settings.scratch is not None
        set_seed(seed)
        config = AutoConfig.for_model(
            **settings.scratch["config"],
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype == "auto" else dtype, **options)
    return _from_pretrained(AutoModelForCausalLM, start, settings, dtype=dtype, use_safetensors=True, **options)


def build_peft_config(peft: dict[str, Any]) -> PeftConfig | None:
    """The adapter of a section `peft`; None when all weights are trained."""
    config_class = PEFT_CLASSES[peft.get("type", "none")]
    if config_class is None:
        return None
    return resolve(config_class)(**{key: value for key, value in peft.items() if key != "type"}, task_type="CAUSAL_LM")


def save_finished(
    policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, model_dir: Path, adapter_dir: Path
) -> None:
    """Saves a trained policy, whole or not at all, for `AutoModelForCausalLM.from_pretrained(model_dir)`.

    An adapter is saved by itself and then merged: the next stage starts from, and is compared with, the whole model.
    """
    if isinstance(policy, PeftModel):
        _publish(adapter_dir, policy, tokenizer)
        policy = policy.merge_and_unload()
    _publish(model_dir, policy, tokenizer)


def _publish(folder: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    staged = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    for file in staged.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for the owner only
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def _from_pretrained(cls: Any, source: str, settings: ModelSettings, **options: Any) -> Any:
    if settings.revision and source == settings.path:
        options["revision"] = settings.revision
    try:
        return cls.from_pretrained(source, trust_remote_code=settings.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        hint = None if Path(source).exists() else "is the id right, and the Hub reachable? A gated model needs HF_TOKEN"
        if "pytorch_model.bin" in reason:
            hint = "weights must be safetensors: other files can run code when they are loaded"
        raise AlignctlError(f"cannot load {source}: {reason}", hint) from error
