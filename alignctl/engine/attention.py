"""Attention over a packed row (see layout.py) with SDPA, which runs anywhere: part by part, so that nothing is spent on
what a mask over the whole row would hide. Torch only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignctl.engine.layout import Layout


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


def _stacked(row: Tensor, count: int) -> Tensor:
    """`[1, heads, count * length, head size]` as `[count, heads, length, head size]`"""
    return row[0].unflatten(1, (count, -1)).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention as a row `[1, count * length, heads, head size]`, which is how SDPA lays it into memory."""
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(0, 1)[None]
