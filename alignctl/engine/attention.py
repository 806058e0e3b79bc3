"""Attention over a packed row (see layout.py), without spending anything on what a mask over the whole row would hide:
part by part with the kernel behind SDPA on a CPU, or with SDPA itself, which runs anywhere, or all parts at once with a
kernel for sequences of several lengths. What a layer keeps for its backward pass grows as the row. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from alignctl.engine.layout import Layout, Spans

BySpans = Callable[[Tensor, Tensor, Tensor, Spans, float | None], Tensor]
"""Causal attention of sequences by themselves, aligned at their ends: of queries `[queries, heads, head size]`, of keys
and values `[keys, key heads, head size]`, where each of them lies, and a scale."""
_QUERIES = 1024  # of a piece that is computed with a mask


def joined(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """Attention on CPUs: each part of the row by itself, then all branches of a group together with what they share,
    joined by the sums that their weights are divided by. Nothing is masked but what a causal kernel skips, and nothing
    is computed or kept twice.

    Args:
        query: `[1, heads, length, head size]`
        key: `[1, key heads, length, head size]`, as `value`; fewer heads are shared among those of the query.
        scale: Of the scores; None for 1 / sqrt(head size).

    Returns:
        `[1, heads, length, head size]`
    """
    return _Joined.apply(query, key, value, layout, scale)


def sdpa_by_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    """Attention of what each group shares, then of each branch with it. Runs anywhere. Masks are not kept: what needs
    one is computed again in the backward pass.

    Args:
        query: `[1, heads, length, head size]`
        key: `[1, key heads, length, head size]`, as `value`; fewer heads are shared among those of the query.
        scale: Of the scores; None for 1 / sqrt(head size).
        dropout: Of the weights.

    Returns:
        `[1, heads, length, head size]`
    """
    if query.is_cuda and query.size(1) != key.size(1):  # with a mask, CUDA's fast kernels want all heads
        key, value = (one.repeat_interleave(query.size(1) // key.size(1), 1) for one in (key, value))
    options = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.size(1) != key.size(1)}
    # Divided at once: each slice would have a gradient of the size of the whole row.
    sizes = [count * length for _, length, count in layout.pieces]
    pieces = zip(*(one.split(sizes, 2) for one in (query, key, value)), strict=True)
    parts = []
    for count, group in layout.runs:
        before: tuple[Tensor, ...] = ()
        if group.shared:
            shared = next(pieces)
            before = shared[1:]
            parts.append(_attend_causal(*(_stacked(one, count) for one in shared), **options))
        for _ in group.branches:
            query, *own = next(pieces)
            key, value = (torch.cat(both, 2) for both in zip(before, own, strict=True)) if before else own
            parts.append(_attend_causal(query, key, value, **options))
    return torch.cat(parts, 1).transpose(1, 2)


def by_spans(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, attend: BySpans) -> Tensor:
    """Attention of a whole row in one call: what branches share stands before the keys of each of them once more.

    Args:
        query: `[1, heads, length, head size]`
        key: `[1, key heads, length, head size]`, as `value`.
        scale: Of the scores; None for 1 / sqrt(head size).

    Returns:
        `[1, heads, length, head size]`
    """
    spans = layout.spans
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    if spans.keys is not None:
        key, value = (_Gathered.apply(one, spans.keys) for one in (key, value))
    return attend(query, key, value, spans, scale).transpose(0, 1)[None]


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float | None) -> Tensor:
    """`BySpans` with the flash kernel behind SDPA: CUDA, 16 bits, head sizes that 8 divides.

    By the operator, which is the same from torch 2.8 to 2.14 and has a gradient, and takes fewer heads of keys;
    `torch.nn.attention.varlen` calls it too, but is new in 2.10 and has other arguments in every version since. Its
    causal mask is aligned at the end of each sequence (flash attention 2.1; see torch.nn.attention.bias).
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, spans.query_ends, spans.key_ends, spans.longest_query, spans.longest_key,
        0.0, True, False, scale=scale,
    )[0]  # fmt: skip


class _Gathered(torch.autograd.Function):
    """`row[index]`. The gradients of a token that is taken several times are added in float32; `index_select` would
    round each sum to 16 bits."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(row)
        return row.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        exact = grad if grad.dtype.itemsize >= 4 else grad.float()
        return exact.new_zeros(ctx.length, *grad.shape[1:]).index_add_(0, index, exact).to(grad.dtype), None


class _Joined(torch.autograd.Function):
    """The kernel behind SDPA on a CPU says the log of what it divided by. With that of all keys, and the output of all
    keys, its backward pass gives each part of the keys its gradient: the weights are exp(score - log), and what is
    subtracted from their gradient is the product of output and its gradient (arXiv:2205.14135, appendix B.2)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        logs = out.new_empty(*out.shape[:3], dtype=torch.promote_types(out.dtype, torch.float32))
        for part in _cut(layout, query, key, value, out, logs):
            found = _forward(*part[:3], 0.0, True, scale=scale)
            for whole, one in zip(part[3:], found, strict=True):
                whole.copy_(one)
        for own, shared in _looking_back(layout):
            found, log = _forward(query[:, :, own], key[:, :, shared], value[:, :, shared], 0.0, False, scale=scale)
            part, before = out[:, :, own], logs[:, :, own]
            both = torch.logaddexp(before, log)
            share, share_before = ((one - both).exp_().unsqueeze(-1) for one in (log, before))
            part.copy_(share_before * part + share * found)
            before.copy_(both)
        ctx.save_for_backward(query, key, value, out, logs)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logs = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [torch.empty_like(one) for one in (query, key, value)]
        for part in _cut(ctx.layout, grad, query, key, value, out, logs, *grads):
            for whole, one in zip(part[6:], _backward(*part[:6], 0.0, True, scale=ctx.scale), strict=True):
                whole.copy_(one)
        for own, shared in _looking_back(ctx.layout):
            places = [own, own, shared, shared, own, own]
            part = [one[:, :, at] for one, at in zip((grad, query, key, value, out, logs), places, strict=True)]
            found = _backward(*part, 0.0, False, scale=ctx.scale)
            for whole, at, one in zip(grads, (own, shared, shared), found, strict=True):
                whole[:, :, at] += one
        return *grads, None, None


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _cut(layout: Layout, *rows: Tensor) -> Iterator[list[Tensor]]:
    """Each piece of rows `[1, heads, length, ...]`, equal ones as a batch."""
    for start, length, count in layout.pieces:
        yield [_stacked(row[:, :, start : start + count * length], count) for row in rows]


def _looking_back(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """Of each group that shares something, where its branches lie, and what they share."""
    for group in layout.groups:
        if group.shared and group.branches:
            end = group.start + group.shared
            yield slice(end, end + sum(group.branches)), slice(group.start, end)


def _stacked(row: Tensor, count: int) -> Tensor:
    """`[1, heads, count * length, ...]` as `[count, heads, length, ...]`"""
    return row[0].unflatten(1, (count, -1)).transpose(0, 1)


def _attend_causal(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention aligned at the end, as a row `[1, count * length, heads, head size]`, which is how SDPA lays it into
    memory. What a kernel does not know to mask by itself is cut into pieces of so many queries, with masks that are
    made anew in the backward pass."""
    before = key.size(2) - query.size(2)
    if query.is_cuda and not before:
        return _as_row(F.scaled_dot_product_attention(query, key, value, is_causal=True, **options))
    parts = []
    for start in range(0, query.size(2), _QUERIES):
        some = query[:, :, start : start + _QUERIES]
        seen = before + start + some.size(2)
        arguments = some, key[:, :, :seen], value[:, :, :seen]
        again = {"use_reentrant": False, "preserve_rng_state": options["dropout_p"] > 0}
        parts.append(checkpoint(_attend_masked, *arguments, **again, **options))
    return _as_row(torch.cat(parts, 2))


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    queries, keys = query.size(2), key.size(2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def _as_row(attended: Tensor) -> Tensor:
    return attended.transpose(1, 2).flatten(0, 1)[None]
