"""From what was drawn and scored to what PPO learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignctl.rollout.episodes import Episodes
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score
from alignctl.trainers.on_policy.experience import Experience, Sum, at_tokens, masks, moments, spread
from alignctl.trainers.on_policy.models import Outputs
from alignctl.trainers.on_policy.ppo.config import PPOConfig
from alignctl.trainers.on_policy.ppo.objective import advantages_and_returns, whiten


@dataclass(frozen=True)
class PPOExperience(Experience):
    """What a rollout is worth to PPO."""

    values: Tensor
    rewards: Tensor
    """With the KL penalty."""
    returns: Tensor


def build_experience(
    episodes: Episodes, outputs: Outputs, scores: Sequence[Score], kl_coef: float, args: PPOConfig, add_up: Sum
) -> PPOExperience:
    """Rewards, advantages and returns of a rollout.

    A token is rewarded with minus its KL penalty, and with the score that stands at it besides: that of the whole
    completion at its last token (arXiv:1909.08593, Eq. 2).

    Args:
        outputs: By the models as they were when the tokens were drawn.
    """
    logps, reference, values = (spread(flat, episodes) for flat in (outputs.logps, outputs.ref_logps, outputs.values))
    device = logps.device
    present, mask, completion = masks(episodes, device)
    is_last = torch.arange(logps.size(1), device=device) == present.sum(1, keepdim=True) - 1
    rewards = -kl_coef * kl_estimates(logps, reference, args.kl_estimator) * mask
    rewards = rewards + at_tokens(scores, rewards)
    if args.whiten_rewards:
        _, var = moments(rewards, mask, add_up)
        rewards = rewards * torch.rsqrt(var + 1e-8)
    goes_on = torch.tensor([args.bootstrap_truncated and not end for end in episodes.ended], device=device)
    discounts = args.gamma * torch.where(is_last, goes_on[:, None].to(rewards.dtype), present.to(rewards.dtype))
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    after = torch.where(is_last, outputs.last_values[:, None], after)
    states = torch.cat([values[:, :1], after], 1)
    advantages, returns = advantages_and_returns(rewards, states, discounts, args.lam, present)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, *moments(advantages, mask, add_up))
    return PPOExperience(
        present, mask, completion, logps, reference, advantages * mask, values=values, rewards=rewards,
        returns=returns * mask,
    )  # fmt: skip
