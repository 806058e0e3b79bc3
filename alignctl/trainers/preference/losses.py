"""Preference losses that TRL's stable trainers lack, as functions of log-probabilities. Pure.

Losses are per pair, `[batch]`. `logps` are sums over a completion's tokens, `mean_logps` are divided by their number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ipo_losses(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float) -> Tensor:
    """IPO, arXiv:2310.12036, Eq. 17: the squared distance of the difference of log-ratios from 1 / (2 beta).

    Args:
        chosen_log_ratios: log(policy / reference) of the chosen completions: sums as in the paper, or divided by the
            number of tokens.
        rejected_log_ratios: The same of the rejected ones.
        beta: tau in the paper; larger keeps the policy closer to the reference.
    """
    return (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)) ** 2


def simpo_losses(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO, arXiv:2405.14734, Eq. 6: -log sigmoid(beta * (difference of mean log-probabilities) - gamma).

    Args:
        gamma: Target margin of the rewards beta * mean_logps.
        label_smoothing: Share of pairs assumed to be labelled the wrong way round, as in cDPO.
    """
    margin = beta * (chosen_mean_logps - rejected_mean_logps) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def log_odds_ratio(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """ORPO, arXiv:2403.07691, Eq. 4: log of the odds of the chosen over the odds of the rejected completion, where a
    completion's probability is the geometric mean of its tokens'."""
    return (chosen_mean_logps - rejected_mean_logps) - (_log1mexp(chosen_mean_logps) - _log1mexp(rejected_mean_logps))


def odds_ratio_losses(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """ORPO's preference term, arXiv:2403.07691, Eq. 7: -log sigmoid(log odds ratio)."""
    return -F.logsigmoid(log_odds_ratio(chosen_mean_logps, rejected_mean_logps))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Machler 2012, Eq. 7); 0 itself, a certain token, is moved just
    below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero = x > -math.log(2)
    # Each branch gets only arguments it is finite for: `where` alone would still send NaN back through the other one.
    near, far = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
