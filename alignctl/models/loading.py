"""Loads tokenizers and models for the roles of a stage, and builds its adapter. saving.py saves what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from alignctl.config.schema import PEFT_CLASSES, QUANTIZED, ModelSettings
from alignctl.engine.forward import bare
from alignctl.errors import AlignctlError, RequestError
from alignctl.methods.registry import Role, resolve
from alignctl.models.sharding import undivided
from alignctl.models.template import end_tokens
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
    if settings.eos_token:
        if settings.eos_token not in tokenizer.get_vocab():
            raise RequestError(
                f"`model.eos_token={settings.eos_token}` is not a token of {source}",
                f"its special tokens are {', '.join(tokenizer.all_special_tokens)}",
            )
        tokenizer.eos_token = settings.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_reward_tokenizer(folder: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model, from its own folder or Hub id."""
    tokenizer = _from_pretrained(AutoTokenizer, folder, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# The model class of a role, and the task that peft calls it by.
_CLASSES: dict[Role, tuple[Any, str]] = {
    "policy": (AutoModelForCausalLM, "CAUSAL_LM"),
    "reference": (AutoModelForCausalLM, "CAUSAL_LM"),
    "reward_model": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "value_model": (AutoModelForSequenceClassification, "SEQ_CLS"),
}


def load_model(
    settings: ModelSettings,
    role: Role,
    start: str | None,
    tokenizer: PreTrainedTokenizerBase,
    peft: dict[str, Any],
    seed: int,
) -> PreTrainedModel:
    """Loads the model of a role, or makes one with random weights. A reward model has one output; where the checkpoint
    has no head for it, the head starts at random.

    With `dtype: auto` the weights keep the checkpoint's type, unless all of them are trained: then they are float32,
    because small updates are lost in 16 bits (mixed precision comes from the stage's `bf16`).

    Args:
        start: Folder or Hub id of the weights; None for random ones.
        peft: The section `peft` of the stage; a quantized type loads the weights in 4 bits.
    """
    model_class, _ = _CLASSES[role]
    set_seed(seed)
    options: dict[str, Any] = {"dtype": _dtype(settings, peft)}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    scores = model_class is AutoModelForSequenceClassification
    if scores:
        options["num_labels"] = 1
    if start is None:
        model = _from_scratch(model_class, settings, tokenizer, **options)
    else:
        if _is_quantized(peft):
            options |= {"dtype": torch.bfloat16, "quantization_config": _four_bits()}
        model = _from_pretrained(model_class, start, settings, use_safetensors=True, **options)
    if scores:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it scores the token before the padding
    elif settings.eos_token:
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = end_tokens(model, tokenizer)
    return model


def _dtype(settings: ModelSettings, peft: dict[str, Any]) -> Any:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.float32 if PEFT_CLASSES[peft.get("type", "none")] is None or settings.scratch else "auto"


def _is_quantized(peft: dict[str, Any]) -> bool:
    return peft.get("type") in QUANTIZED


def _four_bits() -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in bfloat16: arXiv:2305.14314, Sec. 3."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _from_scratch(
    model_class: Any,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    assert settings.scratch is not None
    config = AutoConfig.for_model(
        **settings.scratch["config"],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({} if num_labels is None else {"num_labels": num_labels}),
    )
    with undivided():  # else ZeRO-3 would draw other random weights
        return model_class.from_config(config, **options)


def build_peft_config(peft: dict[str, Any], role: Role) -> PeftConfig | None:
    """The adapter of a section `peft` for a role; None when all weights are trained."""
    config_class = PEFT_CLASSES[peft.get("type", "none")]
    if config_class is None:
        return None
    _, task = _CLASSES[role]
    return resolve(config_class)(**{key: value for key, value in peft.items() if key != "type"}, task_type=task)


def longest_seen(model: nn.Module) -> int | None:
    """How many tokens a model can see; None where its config does not say."""
    return getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)


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
