"""Saves the finished model of a stage, and its adapter, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import alignctl
from alignctl.errors import AlignctlError
from alignctl.models.comparing import Difference, difference, gives_scores, is_same, said_once_saved
from alignctl.models.merging import is_beside, merged
from alignctl.models.readme import write_readme
from alignctl.models.verifying import check_saved
from alignctl.run.files import publish_folder, write_json
from alignctl.run.fingerprint import listed
from alignctl.run.owner import take_away
from alignctl.run.paths import PRODUCT_MANIFEST, StagePaths

# What a finished model may have otherwise than the start: its tokens are the tokenizer's.
_MEANT = (
    "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config",
    "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Configs:
    """The configs that a model starts with; training changes some of their values for its own sake."""

    model: PreTrainedConfig
    generation: Any
    """None for a model that does not generate."""


@dataclass(frozen=True)
class Trained:
    """What was trained, and how it is to be saved."""

    model: PreTrainedModel | PeftModel
    start: Configs
    rows: Sequence[Tensor]
    """Token ids of a few rows, and"""
    said: Tensor
    """what the trained model says of them (models/comparing.py)."""
    computed_in_16_bits: bool = False
    """Whether it said that in 16 bits, whatever type its weights have."""
    dtype: torch.dtype | None = None
    """Of the finished model; None for that of the weights."""
    merge: bool = True
    """Whether an adapter is merged, or kept alone."""
    wholly: bool = True
    """Whether all of it is written; else it is not looked at again."""


@dataclass(frozen=True)
class Saved:
    """What was saved of a model."""

    dtype: str
    bytes: int
    rounded: bool
    """Whether the trained model held its weights or computed otherwise, so that it says other things by rounding."""
    difference: Difference | None
    """None where there was no memory to load it once more."""


def save_finished(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    paths: StagePaths,
    load_whole: Callable[[], PreTrainedModel],
    facts: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Saved | None:
    """Saves a trained model, whole or not at all, for `from_pretrained(paths.model)` of its class.

    An adapter is saved by itself and then merged: the next stage starts from, and is compared with, the whole model.

    Args:
        load_whole: Gives the weights under the adapter as the checkpoint has them, where those of the trained model
            will not do: merging into 4 bits would round the adapter away.
        facts: JSON files to put beside the weights, by name.
        made: What its manifest says besides.

    Returns:
        What is said of the whole model; None where the adapter is kept alone.

    Raises:
        AlignctlError: What was written is not what was trained; none of it is left.
    """
    model = trained.model
    if isinstance(model, PeftModel):
        with publishing(paths.adapter, tokenizer, facts, made | {"product": "adapter"}) as staged:
            model.save_pretrained(staged, selected_adapters=["default"])  # others may have been trained beside it
            if trained.wholly:
                check_saved(staged, model)
            write_readme(staged, model)
    return save_model(trained, tokenizer, paths, load_whole, facts, made)


def save_model(
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    paths: StagePaths,
    load_whole: Callable[[], PreTrainedModel],
    facts: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Saved | None:
    """The same, once the adapter is saved."""
    model = trained.model
    in_memory, in_4_bits = type_of(model), is_in_4_bits(model)
    on_gpu = model.device.type != "cpu"
    if isinstance(model, PeftModel):
        if not trained.merge or (in_4_bits and not trained.wholly):  # what was saved in part cannot be loaded
            return None
        if in_4_bits:
            model = PeftModel.from_pretrained(load_whole(), paths.adapter)
        if trained.dtype and trained.dtype.itemsize > model.dtype.itemsize:
            model.to(trained.dtype)
        model = merged(model)
    if trained.dtype:
        model.to(trained.dtype)
    start_again(model, trained.start)
    kind = type_of(model)
    narrower = in_memory.itemsize < 4 or kind.itemsize < in_memory.itemsize
    rounded = in_4_bits or narrower or trained.computed_in_16_bits
    with publishing(paths.model, tokenizer, facts, made | {"product": "model"}) as staged:
        model.save_pretrained(staged)
        said = None
        if trained.wholly:
            check_saved(staged, model)
            said = said_once_saved(staged, type(model), trained.rows)
        apart = None if said is None else difference(said, trained.said)
        if apart and not (in_4_bits or is_same(said, trained.said, gives_scores(model), rounded, on_gpu)):
            raise _saved_otherwise(apart, narrower and kind != torch.float32)
    return Saved(shown(kind), bytes_of(paths.model), rounded, apart)


def is_in_4_bits(model: PreTrainedModel | PeftModel) -> bool:
    """Whether weights are quantized, so that an adapter cannot be put into them."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _saved_otherwise(apart: Difference, may_be_wider: bool) -> AlignctlError:
    wider = "; in another run, `model.save_dtype=float32` saves it without rounding" if may_be_wider else ""
    return AlignctlError(
        "the model was not saved as it was trained: it says other things than in memory, of single tokens or rows by "
        f"up to {apart.largest:.2g}",
        f"it was removed again; what was trained is in the checkpoints, and an adapter in `adapter/` as well{wider}",
    )


def shown(kind: torch.dtype) -> str:
    """A type as people write it."""
    return str(kind).removeprefix("torch.")


def bytes_of(folder: Path) -> int:
    """Of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def type_of(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """Of the weights: the widest that one of them has. What is trained beside them does not count."""
    weights = model.named_parameters()
    kinds = {one.dtype for name, one in weights if one.is_floating_point() and not is_beside(name)}
    return max(kinds, key=lambda kind: kind.itemsize, default=model.dtype)


def start_again(model: PreTrainedModel, start: Configs) -> None:
    """Puts back what training changed of a model's configs for its own sake."""
    _as_before(model.config, start.model)
    if start.generation is not None:
        _as_before(model.generation_config, start.generation)


def _as_before(config: Any, start: Any) -> None:
    """Puts the values of a config back to those it started with, in its parts too."""
    for name, value in vars(start).items():
        now = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig) and isinstance(now, PreTrainedConfig):
            _as_before(now, value)
        elif not name.startswith("_") and name not in _MEANT and now != value:
            setattr(config, name, value)


@contextmanager
def publishing(
    folder: Path, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any], made: Mapping[str, Any]
) -> Iterator[Path]:
    """A folder to write a model or an adapter to; it takes its name, with the tokenizer and a manifest in it, unless
    the caller finds a fault with it."""
    staged = folder.with_name(f".{folder.name}.staging")
    take_away(staged)
    staged.mkdir(parents=True)
    try:
        yield staged
        tokenizer.save_pretrained(staged)
        for name, content in facts.items():
            (staged / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        made = {"stage": folder.parent.name, "alignctl": alignctl.__version__} | made
        write_json(staged / PRODUCT_MANIFEST, made | {"files": listed(staged)})
        publish_folder(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
