"""Attention over a packed row (see layout.py) with SDPA, which runs anywhere: part by part, so that nothing is spent on
what a mask over the whole row would hide. Torch only."""

from __future__ import annotations

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
    parts = []
    for group, masks in zip(layout.groups, layout.branch_masks, strict=True):
        start = group.start + group.shared
        shared = slice(group.start, start)
        shared_key, shared_value = key[:, :, shared], value[:, :, shared]
        if group.shared:
            parts.append(
                F.scaled_dot_product_attention(query[:, :, shared], shared_key, shared_value, is_causal=True, **options)
            )
        for length, mask in zip(group.branches, masks, strict=True):
            own = slice(start, start + length)
            start += length
            keys = torch.cat([shared_key, key[:, :, own]], 2)
            values = torch.cat([shared_value, value[:, :, own]], 2)
            if mask is None:
                queries = torch.cat([query[:, :, shared], query[:, :, own]], 2)
                whole = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
                parts.append(whole[:, :, group.shared :])
            else:
                parts.append(F.scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask, **options))
    return torch.cat(parts, 2)
