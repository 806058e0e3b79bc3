"""PPO's formulas, as functions of tensors. Pure.

Tensors are `[batch, length]`, a column for each token of a completion, with a mask of the tokens that are there; means
are over the tokens of a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of what the mask keeps, over everything or a dimension; 0 where it keeps nothing."""
    mask = mask.to(values.dtype)
    dims = tuple(range(values.ndim)) if dim is None else (dim,)
    return (values * mask).sum(dims) / mask.sum(dims).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Values with mean 0 and variance 1 under the mask, and 0 outside it.

    Args:
        mean: Of the values; given, because it may be of more than this process holds.
        var: Likewise.
    """
    return (values - mean) * torch.rsqrt(var + 1e-8) * mask


def advantages_and_returns(
    rewards: Tensor, values: Tensor, discounts: Tensor, lam: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, arXiv:1506.02438, Eq. 16, and what the value model is to learn from it.

    Args:
        rewards: `[batch, length]`, for the token of each column.
        values: `[batch, length + 1]`: of the state before each token, and of the state after the last one.
        discounts: `[batch, length]`: gamma, and 0 for the token that ends an episode.
        lam: lambda; 0 looks one step ahead, 1 to the end.
        mask: Of the tokens that are there, where rows have several lengths; None for all.

    Returns:
        Advantages, and returns = advantages + values, `[batch, length]` each.
    """
    errors = rewards + discounts * values[:, 1:] - values[:, :-1]
    if mask is not None:
        errors = errors * mask
    advantages = torch.zeros_like(errors)
    after = torch.zeros_like(errors[:, 0])
    for column in reversed(range(errors.size(1))):
        after = errors[:, column] + discounts[:, column] * lam * after
        advantages[:, column] = after
    return advantages, advantages + values[:, :-1]


class Clipped(NamedTuple):
    """A loss of each token, and which of them do not move the model because they moved far enough."""

    losses: Tensor
    clipped: Tensor


def policy_losses(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float, dual_clip: float | None = None
) -> Clipped:
    """PPO's clipped objective, negative, of each token: arXiv:1707.06347, Eq. 7.

    Args:
        old_logps: Of the policy that drew the tokens.
        cliprange: How far the ratio may move from 1 to the good.
        dual_clip: Above 1: the most that a token with a negative advantage counts, in multiples of it
            (arXiv:1912.09729, Eq. 4). None for no such limit.
    """
    ratio = (logps - old_logps).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        most = -advantages * dual_clip
        limited = (advantages < 0) & (losses > most)
        losses, clipped = torch.where(limited, most, losses), clipped | limited
    return Clipped(losses, clipped)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None) -> Clipped:
    """Half the squared error of each value, or of the value that may only move so far from the old one, whichever is
    larger: the clipping of OpenAI's baselines, arXiv:2005.12729, Sec. 3. None for no clipping."""
    plain = (values - returns) ** 2
    if cliprange_value is None:
        return Clipped(plain / 2, torch.zeros_like(plain, dtype=torch.bool))
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    bounded = (near - returns) ** 2
    return Clipped(torch.maximum(plain, bounded) / 2, bounded > plain)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next KL coefficient of a proportional controller, arXiv:1909.08593, Sec. 2.2: larger where KL is above its
    target, by at most a fifth of `episodes / horizon`.

    Args:
        kl: Of the last rollout, in nats per completion.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * max(1 + error * episodes / horizon, 0.0)
