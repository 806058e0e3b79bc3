"""The shapes of models without their weights: a table of well-known ones, and the tensors of each family. Torch-free.

shapes.json has the numbers that the config.json of each has on the Hub, and the parameters that transformers (5.23)
counts in a model made of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from alignctl.config.schema import ModelSettings
from alignctl.run.files import read_json

Shape = Mapping[str, Any]
"""Numbers of a model under the names that its config.json has for them, `model_type` among them."""

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "gemma2", "gemma3_text", "olmo2", "phi3")
FAMILIES = (*_LIKE_LLAMA, "gpt_oss")
"""Values of `model_type` whose tensors are known here."""
_NOT_SHAPE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "quantization_config")


@dataclass(frozen=True)
class Tensor:
    """A weight, or several alike."""

    module: str
    """The end of the name of the module that has it: `q_proj`."""
    shape: tuple[int, ...]
    count: int
    """How many there are in the model: one in each layer, or one."""
    linear: bool = False
    """Whether it is the matrix of a linear layer, which an adapter may be put on."""

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def in_layers(self) -> bool:
        return self.module not in OUTSIDE


OUTSIDE = ("embed_tokens", "norm", "lm_head", "score")
"""Modules that lie outside of the layers."""


def shape_of(model: ModelSettings) -> Shape | None:
    """The shape of a checkpoint: of a folder by its config.json, of a Hub id by the table; of a model with random
    weights as its settings have it. None where nothing is known of it."""
    if model.path is None:
        return None if model.scratch is None else {**model.scratch["config"], "vocab_size": model.scratch["vocab_size"]}
    described = read_json(Path(model.path).expanduser() / "config.json")
    return described if described is not None else _known().get(model.path)


def without_files(shape: Shape) -> dict[str, Any]:
    """What of a config.json describes the model, and not where it comes from."""
    return {key: value for key, value in shape.items() if key not in _NOT_SHAPE}


def saved_in(shape: Shape) -> str:
    """The type of a checkpoint's weights; all in the table have bfloat16."""
    return str(shape.get("dtype") or shape.get("torch_dtype") or "bfloat16")


def known_ids() -> list[str]:
    """Hub ids in the table."""
    return list(_known())


@cache
def table() -> dict[str, dict[str, Any]]:
    """shapes.json: of each model its `ids` on the Hub, its `shape`, and how many `parameters` it has."""
    return json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


@cache
def _known() -> dict[str, Shape]:
    return {one: model["shape"] for model in table().values() for one in model["ids"]}


def tensors(shape: Shape, scores: bool = False) -> list[Tensor] | None:
    """All weights of a model; None where its family is not known.

    Args:
        scores: Whether it has a head for one score in place of that for tokens.
    """
    if shape.get("model_type") not in FAMILIES:
        return None
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    found = [Tensor("embed_tokens", (vocabulary, width), 1), *_layer(shape), Tensor("norm", (width,), 1)]
    if scores:
        found.append(Tensor("score", (1, width), 1, linear=True))
    elif not shape.get("tie_word_embeddings", False):
        found.append(Tensor("lm_head", (vocabulary, width), 1, linear=True))
    return found


def _layer(shape: Shape) -> Iterator[Tensor]:
    kind, width, count = shape["model_type"], shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    size = shape.get("head_dim") or width // heads
    queries, keys = heads * size, (shape.get("num_key_value_heads") or heads) * size

    def matrix(module: str, out: int, into: int, bias: bool = False) -> Iterator[Tensor]:
        yield Tensor(module, (out, into), count, linear=True)
        if bias:
            yield Tensor(module, (out,), count)

    def norm(module: str, length: int = width) -> Tensor:
        return Tensor(module, (length,), count)

    bias = bool(shape.get("attention_bias", False)) or kind == "qwen2"
    if kind == "phi3":
        yield from matrix("qkv_proj", queries + 2 * keys, width)
    else:
        yield from matrix("q_proj", queries, width, bias)
        yield from matrix("k_proj", keys, width, bias)
        yield from matrix("v_proj", keys, width, bias)
    yield from matrix("o_proj", width, queries, bias and kind != "qwen2")
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield from (norm("q_norm", size), norm("k_norm", size))
    elif kind == "olmo2":
        yield from (norm("q_norm", queries), norm("k_norm", keys))
    if kind != "olmo2":
        yield norm("input_layernorm")
    yield norm("post_attention_layernorm")
    if kind in ("gemma2", "gemma3_text"):
        yield norm("pre_feedforward_layernorm")
    if kind in ("gemma2", "gemma3_text", "olmo2"):
        yield norm("post_feedforward_layernorm")
    yield from _experts(shape) if kind in ("qwen3_moe", "gpt_oss") else _feed_forward(shape, matrix)


def _feed_forward(shape: Shape, matrix: Any) -> Iterator[Tensor]:
    width, inner, bias = shape["hidden_size"], shape["intermediate_size"], bool(shape.get("mlp_bias", False))
    if shape["model_type"] == "phi3":
        yield from matrix("gate_up_proj", 2 * inner, width)
    else:
        yield from matrix("gate_proj", inner, width, bias)
        yield from matrix("up_proj", inner, width, bias)
    yield from matrix("down_proj", width, inner, bias)


def _experts(shape: Shape) -> Iterator[Tensor]:
    """A mixture's experts and what chooses among them; the weights of all experts of a layer are one tensor."""
    width, count = shape["hidden_size"], shape["num_hidden_layers"]
    experts = shape.get("num_experts") or shape["num_local_experts"]
    inner = shape.get("moe_intermediate_size") or shape["intermediate_size"]
    yield Tensor("router", (experts, width), count)
    if shape["model_type"] == "gpt_oss":
        yield Tensor("experts", (experts, width, 2 * inner), count)
        yield Tensor("experts", (experts, inner, width), count)
        yield Tensor("experts", (experts, 2 * inner), count)
        yield Tensor("experts", (experts, width), count)
        yield Tensor("router", (experts,), count)
        yield Tensor("sinks", (shape["num_attention_heads"],), count)
    else:
        yield Tensor("experts", (experts, 2 * inner, width), count)
        yield Tensor("experts", (experts, width, inner), count)
