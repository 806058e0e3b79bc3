"""A packed row that several processes compute together: each has a part of its tokens, and in attention all tokens of
some of the heads. Knows no loss and no trainer; torch only.

All of them hold the whole layout, and every one comes to the scores of all tokens, so that what follows is computed by
each as if it were alone. The gradients of weights then are N times those of the tokens of a process, where there are N,
and their mean over the processes, which is what data parallel training takes, is that of the row.

The idea is DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import pad


def group_of_rows(model: nn.Module) -> ProcessGroup | None:
    """The processes that compute a model's rows together with this one now; None where it computes them alone."""
    return getattr(model, "row_group", None)


@contextmanager
def rows_together(models: Iterable[nn.Module], group: ProcessGroup | None) -> Iterator[None]:
    """Meanwhile packed rows of these models are computed by all processes of a group, which give them the same ones."""
    models = list(models)
    for model in models:
        model.row_group = group
    try:
        yield
    finally:
        for model in models:
            del model.row_group


def own_part(row: Tensor, group: ProcessGroup) -> Tensor:
    """The part of this process of `[1, length]`, whose length the processes divide."""
    return row.chunk(group.size(), 1)[group.rank()]


def some_heads(tokens: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of a part of the tokens `[1, heads, length / N, size]` as some heads of all tokens
    `[1, heads / N, length, size]`."""
    return _Exchanged.apply(tokens, group, 1, 2)


def all_heads(heads: Tensor, group: ProcessGroup) -> Tensor:
    """Some heads of all tokens `[1, length, heads / N, size]` as all heads of a part of them."""
    return _Exchanged.apply(heads, group, 1, 2)


def whole_row(part: Tensor, group: ProcessGroup) -> Tensor:
    """`[tokens / N, width]` of each process as `[tokens, width]` in all of them."""
    return _Whole.apply(part, group)


def own_tokens(values: Tensor, group: ProcessGroup) -> Tensor:
    """Of tokens `[tokens, ...]` that are scored, those that this process scores: as many as the others, but for the
    last ones."""
    share = -(-len(values) // group.size())
    return values[share * group.rank() : share * (group.rank() + 1)]


def scores_of_all(own: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
    """What each process found of its own tokens as `[tokens]` in all of them."""
    share = -(-tokens // group.size())
    return _Scores.apply(pad(own, (0, share - len(own))), group)[:tokens]


class _Exchanged(torch.autograd.Function):
    """Divides one dimension among the processes, and puts another one together that they had divided."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, divided: int, joined: int) -> Tensor:
        ctx.how = group, divided, joined
        parts = torch.stack(tensor.chunk(group.size(), divided))
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, divided, joined = ctx.how
        return _Exchanged.apply(grad, group, joined, divided), None, None, None


class _Whole(torch.autograd.Function):
    """Each process gives the whole a gradient: of a part of it they are added up."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(group.size() * len(part), *part.shape[1:])
        distributed.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = torch.stack(grad.chunk(ctx.group.size()))
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=ctx.group)
        return received.sum(0), None


class _Scores(_Whole):
    """All processes give what they have all of the same gradient. It counts as often as there are processes, over which
    the gradients of weights are averaged."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()] * ctx.group.size(), None
