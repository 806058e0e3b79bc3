"""What completions are worth beside the others of their prompt, as functions of tensors. Pure.

Rewards are `[groups, generations]`, a row for each prompt that this process drew to; NaN stands for a completion that
nothing scored: its advantage is 0, and it is in no baseline. Moments of a batch are of all processes, by `add_up`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from alignctl.trainers.on_policy.experience import Sum, moments

_LEAST_STD = 1e-4  # TRL's; added to a deviation


def grpo_advantages(rewards: Tensor, scale: Literal["group", "batch", "none"], add_up: Sum) -> Tensor:
    """Rewards less the mean of their group, over a deviation: arXiv:2402.03300.

    Args:
        scale: By the deviation of the group; of all rewards of the rollout, arXiv:2508.08221; or not at all,
            arXiv:2503.20783. Deviations are unbiased.
    """
    mean, std = _of_groups(rewards)
    advantages = rewards - mean
    if scale == "group":
        advantages = advantages / (std + _LEAST_STD)
    elif scale == "batch":
        advantages = advantages / (_of_all(rewards, add_up)[1] + _LEAST_STD)
    return advantages.nan_to_num(0.0)


def gdpo_advantages(rewards: Tensor, weights: Sequence[float], add_up: Sum) -> Tensor:
    """Each reward scaled in its group, their weighted sum, and that scaled over the rollout: arXiv:2601.05242. Weights
    then are of rewards of one deviation.

    Args:
        rewards: `[sources, groups, generations]`; a source that says nothing of a completion adds nothing to it.
    """
    scaled = []
    for one, weight in zip(rewards, weights, strict=True):
        mean, std = _of_groups(one)
        scaled.append(weight * (one - mean) / (std + _LEAST_STD))
    total = torch.stack(scaled).nansum(0).masked_fill(rewards.isnan().all(0), torch.nan)
    mean, std = _of_all(total, add_up)
    return ((total - mean) / (std + _LEAST_STD)).nan_to_num(0.0)


def rloo_advantages(rewards: Tensor, normalize: bool, add_up: Sum) -> Tensor:
    """Rewards less the mean reward of the others of their group: arXiv:2402.14740.

    Args:
        normalize: Whether they are shifted and scaled to mean 0 and variance 1 over the rollout.
    """
    others = rewards.isfinite().sum(1, keepdim=True) - 1
    baselines = (rewards.nansum(1, keepdim=True) - rewards) / others
    advantages = torch.where(others > 0, rewards - baselines, torch.nan)
    if normalize:
        mean, std = _of_all(advantages, add_up)
        advantages = (advantages - mean) / (std + _LEAST_STD)
    return advantages.nan_to_num(0.0)


def with_kl(rewards: Tensor, kl: Tensor, beta: float, clip: Sequence[float] | None) -> Tensor:
    """Rewards within `clip`, and then less the KL penalty of their completions: arXiv:2402.14740.

    Args:
        kl: `[groups, generations]`, in nats per completion.
    """
    return (rewards if clip is None else rewards.clamp(clip[0], clip[1])) - beta * kl


def without_signal(rewards: Tensor) -> Tensor:
    """`[groups]`, whether the rewards of a group do not differ, so that nothing is learnt from it."""
    _, std = _of_groups(rewards)
    return torch.isclose(std.squeeze(1).nan_to_num(0.0), torch.zeros_like(rewards[:, 0]))


def _of_groups(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each group, `[groups, 1]`; of a single reward the deviation is NaN."""
    count = rewards.isfinite().sum(1, keepdim=True)
    mean = rewards.nanmean(1, keepdim=True)
    squares = ((rewards - mean) ** 2).nansum(1, keepdim=True)
    return mean, (squares / (count - 1)).sqrt()


def _of_all(values: Tensor, add_up: Sum) -> tuple[Tensor, Tensor]:
    mean, var = moments(values.nan_to_num(0.0), values.isfinite(), add_up)
    return mean, var.sqrt()
