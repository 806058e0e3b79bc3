"""The losses of GRPO, its variants and RLOO, as functions of tensors. Pure.

Tensors are `[tokens]`, the tokens of some completions one after another; `completion` says to which each belongs, and
`mask` which are learnt from. Losses are of single tokens: what their sum is divided by is said in grpo.py.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Of log-ratios in VESPO's weights: so far they may be from 0, and no further below it in all than this.
_FARTHEST, _LEAST_LOG = 20.0, math.log(1e-8)


def sum_of_completion(values: Tensor, completion: Tensor) -> Tensor:
    """`[tokens]`, at each token the sum over all of its completion."""
    numbers, place = completion.unique(return_inverse=True)
    return values.new_zeros(len(numbers)).index_add(0, place, values)[place]


def mean_of_completion(values: Tensor, mask: Tensor, completion: Tensor) -> Tensor:
    """`[tokens]`, at each token the mean over those of its completion that the mask keeps."""
    mask = mask.to(values.dtype)
    return sum_of_completion(values * mask, completion) / sum_of_completion(mask, completion).clamp(min=1)


def of_each(values: Tensor, completion: Tensor) -> Tensor:
    """`[completions]`, of each what stands at its first token."""
    return values[torch.cat([completion.new_ones(1, dtype=torch.bool), completion[1:] != completion[:-1]])]


class Clipped(NamedTuple):
    """A loss of each token, and which of them do not move the model because their ratio moved far enough."""

    losses: Tensor
    low: Tensor
    high: Tensor


def clipped_losses(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float, delta: float | None = None
) -> Clipped:
    """The clipped objective, negative: arXiv:2402.03300, whose ratio may rise further than it may fall:
    arXiv:2503.14476.

    Args:
        ratio: To the policy that drew: of tokens; of completions as their geometric mean, GSPO,
            arXiv:2507.18071; or as a whole, RLOO.
        delta: Above 1 + `epsilon_high`: bounds what a token with a negative advantage counts, arXiv:2505.07291.
            None for no such bound.
    """
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    losses = -torch.min(ratio * advantages, bounded * advantages)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Clipped(losses, low, high)


def cispo_losses(ratio: Tensor, logps: Tensor, advantages: Tensor, bound: float) -> Tensor:
    """Every token moves the model, weighted by its ratio up to a bound: arXiv:2506.13585."""
    return -ratio.clamp(max=bound).detach() * advantages * logps


def sapo_losses(ratio: Tensor, advantages: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """A sigmoid of the ratio in place of the clipping, steeper with a higher temperature: arXiv:2511.20347."""
    temperature = _by_sign(advantages > 0, temperature_pos, temperature_neg, ratio.dtype)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


@torch.no_grad()
def vespo_weights(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    completion: Tensor,
    positive: tuple[float, float],
    negative: tuple[float, float],
    sampler_ratio: Tensor | None = None,
) -> Tensor:
    """phi(w) = w^k exp(lambda (1 - w)) of the ratio w of whole completions, 1 where it is 1: arXiv:2602.10693.

    Args:
        positive: k and lambda where the advantage is 0 or more.
        negative: Where it is less.
        sampler_ratio: Of each token, see `sampler_ratios`; a part of w.
    """
    log_w = sum_of_completion(log_ratio.clamp(-_FARTHEST, _FARTHEST) * mask, completion)
    if sampler_ratio is not None:
        log_w = log_w + sum_of_completion(sampler_ratio.log().clamp(_LEAST_LOG, _FARTHEST), completion)
    log_w = log_w.clamp(_LEAST_LOG, _FARTHEST)
    better = advantages >= 0
    k, rate = (_by_sign(better, *pair, log_w.dtype) for pair in zip(positive, negative, strict=True))
    rate = rate.clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(0.0, 0.0, 0.0)


def near_policy(
    logps: Tensor, drawn_logps: Tensor, advantages: Tensor, mask: Tensor, completion: Tensor, threshold: float
) -> Tensor:
    """Whether a token is learnt from although the policy has moved: not where its completion is worse than others and
    has become so much less likely, in nats per token: arXiv:2512.02556.

    Args:
        drawn_logps: Of what drew the completions.
    """
    moved = mean_of_completion((drawn_logps - logps.detach()).nan_to_num(0.0), mask, completion)
    return (advantages >= 0) | (moved <= threshold)


def sampler_ratios(
    logps: Tensor,
    drawn_logps: Tensor,
    mask: Tensor,
    completion: Tensor,
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """How much likelier tokens, or whole completions, are under the policy than under the program that drew them, which
    computes otherwise: weights of a loss, https://fengyao.notion.site/off-policy-rl.

    Args:
        logps: Of the policy, with the weights that were drawn with.
        drawn_logps: As the program says; NaN where it does not: such tokens keep their weight.
        mode: Ratios of tokens or of completions, which are kept within the bounds, or are 0 outside them.
    """
    log_ratio = ((logps - drawn_logps) * mask).nan_to_num(0.0)
    level, _, bounded = mode.partition("_")
    ratio = (sum_of_completion(log_ratio, completion) if level == "sequence" else log_ratio).exp()
    if bounded == "truncate":
        return ratio.clamp(clip_min, clip_max)
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def quantile(values: Tensor, share: float) -> Tensor:
    """The value below which so large a share of those lies that are numbers, between two of them linearly; NaN where
    there are none. As `torch.nanquantile`, which takes 2^24 at most."""
    ordered = values[~values.isnan()].sort().values
    if not len(ordered):
        return values.new_tensor(math.nan)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return torch.lerp(ordered[low], ordered[high], place - low)


def adapted_entropy_coef(coef: float, entropy: float, target: float, delta: float, least: float, most: float) -> float:
    """The next weight of the entropy: a step up where it is not above its target, else a step down,
    arXiv:2505.22312.

    Args:
        entropy: Of the last rollout, in nats per token.
    """
    return min(coef + delta, most) if entropy <= target else max(coef - delta, least)


def _by_sign(positive: Tensor, one: float, other: float, dtype: torch.dtype) -> Tensor:
    return torch.full_like(positive, other, dtype=dtype).masked_fill(positive, one)
