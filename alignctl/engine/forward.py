"""Runs a model over a layout, and divides sequences among forward passes. Knows no loss and no trainer; torch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from alignctl.engine.layout import Layout, bins, pack, pad
from alignctl.engine.row_group import group_of_rows, own_part, whole_row
from alignctl.engine.watched import done

T = TypeVar("T")


def last_hidden(model: nn.Module, layout: Layout) -> Tensor:
    """Last hidden states `[rows * length, width]` of a layout, before the head."""
    model = bare(model)
    group = group_of_rows(model)
    if group is None or layout.attention_mask is not None:
        return model.base_model(**layout.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    layout = layout.lengthened(group.size())
    own = {name: own_part(getattr(layout, name), group) for name in ("input_ids", "position_ids")}
    hidden = model.base_model(**layout.inputs | own, row_group=group, use_cache=False).last_hidden_state
    return whole_row(hidden[0], group)


def takes_packed_rows(model: nn.Module) -> bool:
    """Whether a model's attention knows packed rows, see models/packing.py."""
    return getattr(bare(model), "packed_attention", None) is not None


def bare(model: nn.Module) -> nn.Module:
    """The model of transformers inside a wrapper of peft; adapters stay active, because they live in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_divided(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 divides weights of a model among processes. Its layers are gathered as they are run, by
    all processes together: each has to run them as often as the others."""
    return any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in model.parameters())


def most_of_all(number: int, device: torch.device) -> int:
    """The largest number of all processes, which ask together."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def in_step(model: nn.Module, passes: list[T]) -> list[T]:
    """The passes of this process through a model. Where processes divide it, the last of them is there so often that
    all have as many as the one with most; they ask together."""
    if not is_divided(model):
        return passes
    most = most_of_all(len(passes), next(model.parameters()).device)
    return passes + passes[-1:] * (most - len(passes))


def has_all_weights(model: nn.Module) -> bool:
    """Whether a model can be run as it is: not so what ZeRO-3 divides before training, nor what FSDP2 does, before that
    or of a part by itself."""
    return not any(
        p.numel() == 0 or p.is_meta or isinstance(p, DTensor) or hasattr(p, "share") for p in model.parameters()
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def passes(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    pad_id: int = 0,
) -> Iterator[tuple[list[int], Layout]]:
    """Divides prompts and their completions among forward passes; one that several completions share is computed once
    where the model takes packed rows.

    Args:
        batch_size: Sequences per forward pass, if all were as long as the longest.
        pad_id: Token of the padding, where there is any.

    Yields:
        The numbers of the sequences of a pass, and how they lie in it. Where processes divide the model, all of them
        have as many passes as the one with most: others do their last one again.
    """
    if not prompts:
        return
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    budget = batch_size * max(map(len, rows))
    device = bare(model).device
    packed = takes_packed_rows(model)
    groups: dict[tuple[int, ...] | int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt) if packed else index, []).append(index)
    items = list(groups.values())
    sizes = [len(prompts[item[0]]) + sum(len(completions[index]) for index in item) for item in items]
    for part in in_step(model, list(bins(sizes, budget, padded=not packed))):
        members = [index for item in part for index in items[item]]
        sequences = [rows[index] for index in members]
        if packed:
            number = {index: i for i, index in enumerate(members)}
            yield members, pack(sequences, [[number[i] for i in items[item]] for item in part], device)
        else:
            yield members, pad(sequences, pad_id, device)
        done(len(members))
