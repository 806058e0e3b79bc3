"""Loads tokenizers and models for the roles of a stage, and builds its adapter. saving.py saves what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import cached_file

from alignctl.config.adapters import has_adapter
from alignctl.config.checkpoints import (
    DESCRIPTIONS,
    describe,
    find_flaw,
    find_flaw_of_training,
    find_missing_packages,
    quantization,
)
from alignctl.config.schema import PEFT_CLASSES, QUANTIZED, ModelSettings
from alignctl.data.templates import read_template
from alignctl.engine.forward import bare
from alignctl.errors import AlignctlError, RequestError
from alignctl.methods.registry import Role, resolve
from alignctl.models.dividing import read_in_shares
from alignctl.models.generation import end_tokens, mend_generation_config
from alignctl.models.missing import check_all_loaded
from alignctl.models.sharding import undivided
from alignctl.models.tokenizer import train_tokenizer
from alignctl.models.vocabulary import add_tokens, check_rows, make_rows, refuse_without_row

_SAID = 400  # characters of what a library says


def load_tokenizer(
    settings: ModelSettings, start: str | None, texts: Callable[[], Iterable[str]]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Loads the tokenizer a stage starts with, or trains one on `texts()` for a model from scratch.

    Args:
        start: Folder or Hub id the weights come from; None for random weights.

    Returns:
        The tokenizer, and the ids of the tokens that it was given besides.
    """
    if start is None and settings.tokenizer is None:
        assert settings.scratch is not None
        tokenizer, source = train_tokenizer(texts(), settings.scratch["vocab_size"]), "the tokenizer"
    else:
        source = settings.tokenizer or start
        tokenizer = _tokenizer_of(source, settings)
    new = add_tokens(tokenizer, settings.add_tokens or [])
    if settings.chat_template:
        tokenizer.chat_template = read_template(settings.chat_template)
    if settings.eos_token:
        if settings.eos_token not in tokenizer.get_vocab():
            raise RequestError(
                f"`model.eos_token={settings.eos_token}` is not a token of {source}",
                f"its special tokens are {', '.join(tokenizer.all_special_tokens)}",
            )
        tokenizer.eos_token = settings.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, new


def load_config(source: str, settings: ModelSettings) -> PretrainedConfig:
    """What a checkpoint says of itself, from its folder or Hub id.

    Raises:
        AlignctlError: It cannot be had.
    """
    return _from_pretrained(AutoConfig, source, settings)


def load_own_tokenizer(source: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model or a reference, from its own folder or Hub id."""
    tokenizer = _tokenizer_of(source, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_of(source: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    try:
        tokenizer = _from_pretrained(AutoTokenizer, source, settings)
    except AlignctlError as error:
        if missing := find_missing_packages(source, source):
            raise RequestError(missing.message, missing.hint) from error
        raise
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # made from the kind of the model alone
        raise RequestError(
            f"{source} has no tokenizer: there is no text that it could write",
            "give the folder or Hub id of one as `model.tokenizer=...`",
        )
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
    *,
    trained: bool = False,
    new_tokens: Sequence[int] = (),
    notice: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """Loads the model of a role, or makes one with random weights. A reward model has one output; where it is trained
    and the checkpoint has no head for it, the head starts at random.

    With `dtype: auto` the weights keep the checkpoint's type, unless all of them are trained: then they are float32,
    because small updates are lost in 16 bits (mixed precision comes from the stage's `bf16`).

    Args:
        start: Folder or Hub id of the weights; None for random ones.
        tokenizer: What the model is given tokens by.
        peft: The section `peft` of the stage; a quantized type loads the weights in 4 bits.
        trained: Whether it is one that learns.
        new_tokens: Ids that the tokenizer has and the one beside the weights has not.
        notice: Is told what people should know of how it was loaded.

    Raises:
        RequestError: The checkpoint cannot be what the role needs, weights are missing in it, or it has not a row of
            embeddings for each token.
    """
    model_class, _ = _CLASSES[role]
    set_seed(seed)
    options: dict[str, Any] = {"dtype": _dtype(settings, peft)}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    scores = model_class is AutoModelForSequenceClassification
    labels = {"num_labels": 1} if scores else {}
    if start is None:
        model = _from_scratch(model_class, settings, tokenizer, **labels, **options)
    else:
        _check_files(settings, start, role, peft if trained else None)
        config = _from_pretrained(AutoConfig, start, settings, **labels)
        quantized = quantization(config.to_dict()) is not None
        if _is_quantized(peft) and not quantized:
            options |= {"dtype": torch.bfloat16, "quantization_config": _four_bits()}
        model = _load_weights(
            model_class, start, config, settings, tokenizer, new_tokens, scores and trained, notice, **options
        )
        if quantized:
            _beside_four_bits(model)
        if trouble := mend_generation_config(model):
            notice(f"{start}: {trouble}")
    if scores:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it scores the token before the padding
    elif settings.eos_token:
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = end_tokens(model, tokenizer)
    return model


def _check_files(settings: ModelSettings, start: str, role: Role, peft: dict[str, Any] | None) -> None:
    """What checks/ found nothing about, because it was not on this machine yet.

    Args:
        peft: How the model is trained; None where it is not.

    Raises:
        RequestError: The checkpoint cannot be what the role needs.
    """
    revision = _revision(settings, start)
    into = settings.merge_into if peft is not None and start == settings.path else None
    _fetch_descriptions(start, revision)
    flaw = find_flaw(start, start, role, peft is not None, revision)
    if flaw is None and into:
        _fetch_descriptions(into)
        flaw = find_flaw(f"model.merge_into={into}", into, role, trained=True)
    if flaw is None and peft is not None:
        described = describe(start, revision=revision) or {}
        unmerged = role == "value_model" or not settings.merge  # that model is not saved
        flaw = find_flaw_of_training(start, described, has_adapter(peft), into, unmerged)
    if flaw:
        raise RequestError(flaw.message, flaw.hint)


def _fetch_descriptions(source: str, revision: str | None = None) -> None:
    """Fetches what a Hub id says of itself, where it does; loading says what cannot be had."""
    if not Path(source).exists():
        for file in DESCRIPTIONS:
            with suppress(OSError, ValueError):
                cached_file(source, file, revision=revision)


def _load_weights(
    model_class: Any,
    start: str,
    config: PretrainedConfig,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[int],
    new_head: bool,
    notice: Callable[[str], None],
    **options: Any,
) -> PreTrainedModel:
    """A model with all weights of its checkpoint, and a row of embeddings for each token.

    Raises:
        RequestError: It cannot have them.
    """
    text = config.get_text_config()
    grows = check_rows(start, text.vocab_size, tokenizer, new_tokens, settings.resize_embeddings, notice)
    pad = text.pad_token_id
    if pad is not None and pad >= text.vocab_size:
        text.pad_token_id = None  # torch takes none without a row
    # Rows of what is divided cannot be made; the trainer divides whole weights, too.
    with _whole() if grows or new_tokens else nullcontext():
        model, found = _from_pretrained(
            model_class, start, settings, config=config, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
        check_all_loaded(start, model, found, new_head)
        if grows or new_tokens:
            notice(make_rows(model, tokenizer, new_tokens))
            model.config.get_text_config().pad_token_id = pad
        refuse_without_row(model, start, tokenizer)
    return model


@contextmanager
def _whole() -> Iterator[None]:
    """All weights of a model are read by each process, whatever divides them later."""
    with undivided(), read_in_shares(None):
        yield


def _dtype(settings: ModelSettings, peft: dict[str, Any]) -> Any:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.float32 if not has_adapter(peft) or settings.scratch else "auto"


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


def _beside_four_bits(model: PreTrainedModel) -> None:
    """The weights of a checkpoint in 4 bits that are not, in bfloat16: the type that TRL gives adapters on it, and that
    transformers does not load them in."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.bfloat16)


def _from_scratch(
    model_class: Any,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    assert settings.scratch is not None
    of_tokenizer = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    labels = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.for_model(**dict(settings.scratch["config"]) | of_tokenizer | labels)
    with undivided():  # else ZeRO-3 would draw other random weights
        return model_class.from_config(config, **options)


def build_peft_config(
    peft: dict[str, Any], role: Role, token_rows: dict[str, list[int]] | None = None
) -> PeftConfig | None:
    """The adapter of a section `peft` for a role; None when all weights are trained.

    Args:
        token_rows: Rows of embeddings that are trained beside it, by the names of the layers; those of `peft` are
            among them.
    """
    if not has_adapter(peft):
        return None
    _, task = _CLASSES[role]
    given = {key: value for key, value in peft.items() if key != "type"}
    if token_rows:
        given["trainable_token_indices"] = token_rows
    return resolve(PEFT_CLASSES[peft["type"]])(**given, task_type=task)


def longest_seen(model: nn.Module) -> int | None:
    """How many tokens a model can see; None where its config does not say."""
    return getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)


def _revision(settings: ModelSettings, source: str) -> str | None:
    return settings.revision if source == settings.path else None


def _from_pretrained(cls: Any, source: str, settings: ModelSettings, **options: Any) -> Any:
    if revision := _revision(settings, source):
        options["revision"] = revision
    try:
        return cls.from_pretrained(source, trust_remote_code=settings.trust_remote_code, **options)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        said = str(error).splitlines()
        reason = " ".join(said if said[0].rstrip().endswith(":") else said[:1])[:_SAID]
        hint = None if Path(source).exists() else "is the id right, and the Hub reachable? A gated model needs HF_TOKEN"
        if "no file named" in reason or "pytorch_model.bin" in reason:
            hint = "weights must be safetensors: other files can run code when they are loaded"
        # What is not there may come; what is there and makes no sense was a wrong request.
        is_there = Path(source).is_dir() or not isinstance(error, OSError)
        kind = RequestError if is_there else AlignctlError
        raise kind(f"cannot load {source}: {reason}", hint) from error
