"""Compares what a trained model says of a few rows with what it says once it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignctl.engine.forward import bare, evaluating

_ROWS, _TOKENS = 4, 64


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
            if plain.get_output_embeddings() is not None:
                logits = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            said.append(logits.flatten().cpu())
    return torch.cat(said) if said else torch.empty(0)


def difference(one: Tensor, other: Tensor) -> Difference:
    """Of what two models said of the same rows."""
    apart = (one - other).abs()
    return Difference(float(apart.mean()), float(apart.max())) if len(apart) else Difference(0.0, 0.0)
