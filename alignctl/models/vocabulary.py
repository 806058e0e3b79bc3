"""Tokens of a tokenizer and rows of embeddings: every token has one, and a row without a token is never drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.adapters import matches, names_module
from alignctl.engine.forward import bare
from alignctl.errors import RequestError, first_few

_HINT = "set `model.resize_embeddings=true`, or give the model's own tokenizer with `model.tokenizer=...`"


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """Adds tokens, as ordinary text that is never taken apart; the ids of those that were not there."""
    new = [token for token in dict.fromkeys(tokens) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return [tokenizer.get_vocab()[token] for token in new]


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of embeddings that its tokens take; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_rows(
    source: str,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[int],
    resizes: bool,
    notice: Callable[[str], None] = lambda _: None,
) -> bool:
    """Whether the embeddings of a model have to grow.

    Args:
        source: The model, for people.
        rows: Of its embeddings.
        new: Tokens that were added on request, which may be without a row.
        resizes: Whether others may.
        notice: Is told of tokens without a row that only a text which spells them out becomes.

    Raises:
        RequestError: Others have no row, and may not.
    """
    needed, added = rows_needed(tokenizer), set(new)
    if needed <= rows:
        return False
    without = [token for token, number in tokenizer.get_vocab().items() if number >= rows and number not in added]
    if resizes or not without:
        return True
    said = (
        f"the tokenizer has {needed:,} tokens, and {source} has embeddings for {rows:,}; there is none for "
        + first_few([f"`{token}`" for token in sorted(without)])
    )
    if not _unwritten(tokenizer) - {tokenizer.pad_token} >= set(without):
        raise RequestError(said, _HINT)
    notice(f"{said}, which no row of data may have")
    return any(number >= rows for number in added)


def refuse_without_row(model: PreTrainedModel, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets a model that has no row for some tokens look at its ids before it takes one of those: on a GPU that would
    end in an assertion of CUDA's that names nothing."""
    rows = model.config.get_text_config().vocab_size
    if rows_needed(tokenizer) > rows:
        model.get_input_embeddings().register_forward_pre_hook(partial(_look_at_ids, source, rows, tokenizer))


def _look_at_ids(
    source: str, rows: int, tokenizer: PreTrainedTokenizerBase, _: nn.Module, args: tuple[torch.Tensor]
) -> None:
    if (highest := int(args[0].max())) >= rows:
        raise RequestError(
            f"a row has the token `{tokenizer.convert_ids_to_tokens(highest)}`, for which {source} has no embeddings",
            _HINT,
        )


def _unwritten(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens that neither the tokenizer nor its chat template writes: they stand for images, for instance, or
    fill rows up."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.sep_token, tokenizer.cls_token}
    template = str(tokenizer.chat_template or "")
    return {token for token in special - written if token not in template}


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
    """What peft calls `trainable_token_indices`, so that an adapter learns new tokens, too, besides those that settings
    name: by the names of the layers, of which a tied head goes without saying. None where there are no new ones, or the
    adapter has these layers anyway."""
    layers = _layers(model)
    missed = [
        name for name in layers if not names_module(peft, name) and not matches(name, peft.get("modules_to_save"))
    ]
    if not new or not missed:
        return None
    given = peft.get("trainable_token_indices") or {}
    named = given if isinstance(given, Mapping) else {next(iter(layers)).rpartition(".")[2]: given}
    rows = {key: list(numbers) for key, numbers in named.items()}
    for name in missed:
        key = next((key for key in rows if matches(name, [key])), name.rpartition(".")[2])
        rows[key] = sorted({*rows.get(key, []), *new})
    return rows


def ids_without_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a model could draw and nobody could read: its embeddings are padded to a round number, for instance."""
    rows = bare(model).config.get_text_config().vocab_size
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def check_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, reference: str) -> None:
    """Whether a reference reads the tokens that the policy is trained on. What rows are filled up with, and special
    tokens that no text becomes, one of them alone may have.

    Raises:
        RequestError: It does not: its log-probabilities would be those of another text.
    """
    one, other = ours.get_vocab(), theirs.get_vocab()
    alone = (set(one) - set(other)) & _unwritten(ours) | (set(other) - set(one)) & _unwritten(theirs)
    others = [token for token in {*one, *other} - alone if one.get(token) != other.get(token)]
    if not others:
        return
    token = min(others, key=str)
    places = [f"{vocab[token]}" if token in vocab else "none" for vocab in (one, other)]
    raise RequestError(
        f"the reference {reference} has another vocabulary than the policy: {len(other):,} tokens and {len(one):,}; "
        f"`{token}` is number {places[1]} there and {places[0]} here",
        "name a reference with the policy's tokenizer, or none: then it is what the policy starts from",
    )


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embeddings, and the LM head where it has weights of its own, by their dotted names."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [inputs, *([outputs] if outputs is not None and outputs.weight is not inputs.weight else [])]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in layers}
