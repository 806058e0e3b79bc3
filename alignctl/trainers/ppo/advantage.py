"""From what was drawn and scored to what the update learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignctl.trainers.ppo.config import PPOConfig
from alignctl.trainers.ppo.models import Scored
from alignctl.trainers.ppo.objective import advantages_and_returns, kl_estimates, whiten

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


@dataclass(frozen=True)
class Experience:
    """What a rollout is worth, token by token, `[batch, length]` each."""

    mask: Tensor
    logps: Tensor
    """Of the policy that drew the tokens."""
    ref_logps: Tensor
    values: Tensor
    rewards: Tensor
    """With the KL penalty."""
    advantages: Tensor
    returns: Tensor


def spread(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """`[tokens]` of several completions as `[batch, length]`, 0 behind their ends."""
    return pad_sequence(flat.split(list(lengths)), batch_first=True)


def build_experience(
    scored: Scored,
    ref_logps: Tensor,
    scores: Sequence[float],
    ended: Sequence[bool],
    lengths: Sequence[int],
    kl_coef: float,
    args: PPOConfig,
    add_up: Sum,
) -> Experience:
    """Rewards, advantages and returns of a rollout.

    A token is rewarded with minus its KL penalty, and the last one with the completion's score besides
    (arXiv:1909.08593, Eq. 2).

    Args:
        scored: By policy and value model as they were when the tokens were drawn.
        ref_logps: `[tokens]`, under the reference.
        scores: Of the completions.
        lengths: Of the completions, in tokens.
    """
    logps, reference, values = (spread(flat, lengths) for flat in (scored.logps, ref_logps, scored.values))
    device, count = logps.device, torch.tensor(list(lengths), device=logps.device)
    columns = torch.arange(logps.size(1), device=device)
    mask, is_last = columns < count[:, None], columns == count[:, None] - 1
    rewards = -kl_coef * kl_estimates(logps, reference, args.kl_estimator) * mask
    rewards = rewards + is_last * torch.tensor(list(scores), device=device)[:, None]
    if args.whiten_rewards:
        _, var = moments(rewards, mask, add_up)
        rewards = rewards * torch.rsqrt(var + 1e-8)
    goes_on = torch.tensor([args.bootstrap_truncated and not end for end in ended], device=device)
    discounts = args.gamma * torch.where(is_last, goes_on[:, None].to(rewards.dtype), mask.to(rewards.dtype))
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    after = torch.where(is_last, scored.last_values[:, None], after)
    states = torch.cat([values[:, :1], after], 1)
    advantages, returns = advantages_and_returns(rewards, states, discounts, args.lam, mask)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, *moments(advantages, mask, add_up))
    return Experience(mask, logps, reference, values, rewards, advantages, returns * mask)


def moments(values: Tensor, mask: Tensor, add_up: Sum) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance under a mask, over all processes."""
    mask = mask.to(values.dtype)
    total, count = add_up(torch.stack([(values * mask).sum(), mask.sum()]))
    mean = total / count.clamp(min=1)
    squares = add_up((((values - mean) ** 2) * mask).sum())
    return mean, squares / (count - 1).clamp(min=1)
