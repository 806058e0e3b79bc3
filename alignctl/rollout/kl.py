"""Estimates of the KL divergence between two policies. Pure."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimates(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(policy || reference) of each token, estimated from a token that the policy drew.

    With r = reference / policy, http://joschu.net/blog/kl-approx.html: k1 is -log r, unbiased, below 0 for some tokens;
    k2 is (log r)^2 / 2, biased, of small variance; k3 is r - 1 - log r, unbiased and never below 0.
    """
    log_ratio = ref_logps - logps
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return log_ratio.exp() - 1 - log_ratio
