"""Attention over a packed row (see layout.py), without spending anything on what a mask over the whole row would hide:
part by part with SDPA, which runs anywhere, or all parts at once with a kernel for sequences of several lengths. Torch
only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignctl.engine.layout import Layout, Spans

BySpans = Callable[[Tensor, Tensor, Tensor, Spans, float | None], Tensor]
"""Causal attention of sequences by themselves, aligned at their ends: of queries `[queries, heads, head size]`, of keys
and values `[keys, key heads, head size]`, where each of them lies, and a scale."""


def sdpa_by_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    """Attention of what each group shares, then of each branch with it.

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
    sizes = [size for count, group, _ in layout.runs for size in (count * group.shared, *group.branches)]
    pieces = zip(*(one.split(sizes, 2) for one in (query, key, value)), strict=True)
    parts = []
    for count, group, masks in layout.runs:
        shared = next(pieces)
        if group.shared:
            parts.append(_attend(*(_stacked(one, count) for one in shared), is_causal=True, **options))
        for mask in masks:
            own = next(pieces)
            if not group.shared:
                parts.append(_attend(*own, is_causal=True, **options))
                continue
            key, value = (torch.cat(both, 2) for both in zip(shared[1:], own[1:], strict=True))
            if mask is None:
                query = torch.cat([shared[0], own[0]], 2)
                parts.append(_attend(query, key, value, is_causal=True, **options)[:, group.shared :])
            else:
                parts.append(_attend(own[0], key, value, attn_mask=mask, **options))
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


def _stacked(row: Tensor, count: int) -> Tensor:
    """`[1, heads, count * length, head size]` as `[count, heads, length, head size]`"""
    return row[0].unflatten(1, (count, -1)).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention as a row `[1, count * length, heads, head size]`, which is how SDPA lays it into memory."""
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(0, 1)[None]
