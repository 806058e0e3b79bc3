"""Tokens of a tokenizer and rows of embeddings: every token has one, and a row without a token is never drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from alignctl.engine.forward import bare
from alignctl.errors import RequestError

_NAMED = 3
_HINT = "set `model.resize_embeddings=true`, or give the model's own tokenizer with `model.tokenizer=...`"


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """Adds tokens, as ordinary text that is never taken apart; the ids of those that were not there."""
    new = [token for token in dict.fromkeys(tokens) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return [tokenizer.get_vocab()[token] for token in new]


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of embeddings that its tokens take; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_rows(source: str, rows: int, tokenizer: PreTrainedTokenizerBase, new: Sequence[int], resizes: bool) -> bool:
    """Whether the embeddings of a model have to grow.

    Args:
        source: The model, for people.
        rows: Of its embeddings.
        new: Tokens that were added on request, which may be without a row.
        resizes: Whether others may.

    Raises:
        RequestError: Others have no row, and may not.
    """
    needed = rows_needed(tokenizer)
    if needed <= rows:
        return False
    without = [token for token, number in tokenizer.get_vocab().items() if number >= rows and number not in set(new)]
    if without and not resizes:
        named = ", ".join(f"`{token}`" for token in sorted(without)[:_NAMED])
        more = f" and {len(without) - _NAMED:,} more" if len(without) > _NAMED else ""
        raise RequestError(
            f"the tokenizer has {needed:,} tokens, and {source} has embeddings for {rows:,}; there is none for {named}"
            + more,
            _HINT,
        )
    return True


@torch.no_grad()
def make_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: Sequence[int]) -> str:
    """Gives every token a row of the embeddings and of the LM head, with its bias; what is added, and what new tokens
    get of rows that were there, is the mean of the rows of all other tokens. What people should know of it."""
    rows = model.get_input_embeddings().weight.shape[0]
    needed = max(rows, rows_needed(tokenizer))
    fresh = sorted({number for number in new if number < rows} | set(range(rows, needed)))
    known = sorted({number for number in tokenizer.get_vocab().values() if number < rows} - set(fresh))
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        model.rows_of_checkpoint = rows
    tensors = [layer.weight for layer in _layers(model).values()]
    tensors += [bias for layer in _layers(model).values() if (bias := getattr(layer, "bias", None)) is not None]
    for tensor in tensors:
        tensor[fresh] = tensor[known].float().mean(0).to(tensor.dtype)
    grown = f"the model has {needed:,} embeddings in place of {rows:,}; " if needed > rows else ""
    return f"{grown}{len(fresh):,} of them start at the mean of the others"


def rows_before(model: nn.Module) -> int | None:
    """How many embeddings the checkpoint has, where the model has more."""
    return getattr(bare(model), "rows_of_checkpoint", None)


def rows_to_train(model: PreTrainedModel, new: Sequence[int], peft: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """What peft calls `trainable_token_indices`, so that an adapter learns new tokens: by the names of the layers, of
    which a tied head goes without saying. None where there are none, or the adapter has these layers anyway."""
    targets, whole = peft.get("target_modules"), peft.get("modules_to_save") or []
    reached = {*(targets if isinstance(targets, list) else []), *whole}
    names = [name for name in _layers(model) if name not in reached]
    return {name: list(new) for name in names} if new and names else None


def ids_without_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a model could draw and nobody could read: its embeddings are padded to a round number, for instance."""
    rows = bare(model).config.get_text_config().vocab_size
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def check_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, reference: str) -> None:
    """Whether a reference reads the tokens that the policy is trained on.

    Raises:
        RequestError: It does not: its log-probabilities would be those of another text.
    """
    one, other = ours.get_vocab(), theirs.get_vocab()
    if one == other:
        return
    token = min((token for token in {*one, *other} if one.get(token) != other.get(token)), key=str)
    places = [f"{vocab[token]}" if token in vocab else "none" for vocab in (one, other)]
    raise RequestError(
        f"the reference {reference} has another vocabulary than the policy: {len(other):,} tokens and {len(one):,}; "
        f"`{token}` is number {places[1]} there and {places[0]} here",
        "name a reference with the policy's tokenizer, or none: then it is what the policy starts from",
    )


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embeddings, and the LM head where it has weights of its own, by what adapters call them."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [inputs, *([outputs] if outputs is not None and outputs.weight is not inputs.weight else [])]
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in layers}
