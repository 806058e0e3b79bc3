"""Compares what a trained model says of a few rows with what it says once it is saved. Used by saving.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.weights import saved_tensors
from alignctl.engine.forward import bare, evaluating
from alignctl.models.sharding import undivided
from alignctl.run.memory import free_memory

_ROWS, _TOKENS = 4, 64
_TOLERANCE = 1e-4  # nats or units of a score, and a part of the number
_TOLERANCE_GPU = 1e-2  # the same; products on a GPU may be of TF32, with 10 bits
_MOST_ROUNDED = 0.25  # nats a token, or a part of a score; rounding to 16 bits costs a tenth of that


@dataclass(frozen=True)
class Difference:
    """How far two models are apart: in nats for the log-probability of a token, else in units of a score."""

    mean: float
    largest: float


def rows_to_compare(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], seen: int | None) -> list[Tensor]:
    """Token ids of the beginnings of a few texts, `[tokens]` each.

    Args:
        seen: How many tokens a model can see, where that is known.
    """
    rows: list[Tensor] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: min(_TOKENS, seen or _TOKENS)]
        if len(ids) > 1:
            rows.append(torch.tensor(ids))
        if len(rows) == _ROWS:
            break
    return rows


def gives_scores(model: nn.Module) -> bool:
    """Whether a model says a score of a row, and not a log-probability of each token."""
    return bare(model).get_output_embeddings() is None


@torch.no_grad()
def said_of(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the tokens of rows but the first of each, or their scores where a model has no LM head;
    float32, on the CPU."""
    plain = bare(model)
    said = []
    with evaluating(model):
        for row in rows:
            ids = row[None].to(plain.device)
            # The class's own forward: that of the model may be in mixed precision.
            logits = type(plain).forward(plain, input_ids=ids, use_cache=False).logits.float()
            if not gives_scores(plain):
                logits = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            said.append(logits.flatten().cpu())
    return torch.cat(said) if said else torch.empty(0)


def difference(one: Tensor, other: Tensor) -> Difference:
    """Of what two models said of the same rows."""
    apart = (one - other).abs()
    return Difference(float(apart.mean()), float(apart.max())) if len(apart) else Difference(0.0, 0.0)


def said_once_saved(folder: Path, kind: type[PreTrainedModel], rows: Sequence[Tensor]) -> Tensor | None:
    """What the model in a folder says of rows, loaded in float32; None where there is no memory for that, because it is
    better not compared than killed."""
    needed = 4 * sum(prod(tensor.shape) for tensor in saved_tensors(folder).values())
    free = free_memory()
    if free is not None and 1.2 * needed >= free:
        return None
    with undivided():  # this process loads alone
        return said_of(kind.from_pretrained(folder, dtype=torch.float32), rows)


def is_same(saved: Tensor, trained: Tensor, scores: bool, rounded: bool, on_gpu: bool) -> bool:
    """Whether a saved model is the trained one, by what both said of the same rows.

    Args:
        scores: Whether those are scores: they have no unit of their own, so that rounding is held to their size.
        rounded: Whether one of the models holds its weights, or computes, in fewer bits than the other.
        on_gpu: Whether the trained one computed there.
    """
    if not rounded:
        tolerance = _TOLERANCE_GPU if on_gpu else _TOLERANCE
        return torch.allclose(saved, trained, tolerance, tolerance)
    size = max(1.0, float(trained.abs().mean())) if scores and len(trained) else 1.0
    return difference(saved, trained).mean <= _MOST_ROUNDED * size
