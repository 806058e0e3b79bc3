"""Settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignctl.trainers.on_policy.config import OnPolicyConfig


@dataclass
class PPOConfig(OnPolicyConfig):
    """Settings of PPO beside those of all on-policy methods; the names are those of TRL's former PPOConfig where it had
    them."""

    sharing: Literal["separate", "shared_value", "shared_base"] = "separate"
    """What is held in memory. separate: each model by itself, the value model starting from the reward model where
    there is one; shared_value: the value model is a head on the policy's last hidden states; shared_base: policy, value
    model and reward model are adapters of one frozen base, which by itself is the reference."""
    num_ppo_epochs: int = 4
    """Times that a rollout is gone through."""
    kl_coef: float = 0.05
    """Weight of the KL penalty of each token against the reference; the start where it is adapted."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the penalty: http://joschu.net/blog/kl-approx.html."""
    target_kl: float | None = None
    """KL to the reference, in nats per completion, that the coefficient is adapted to (arXiv:1909.08593, Sec. 2.2);
    None keeps the coefficient fixed."""
    kl_horizon: int = 10000
    """Completions over which an adapted coefficient changes by up to a fifth."""
    bootstrap_truncated: bool = False
    """Whether the value after the last token counts where a completion was cut off, as in a game that goes on; false
    takes it for the end."""
    whiten_rewards: bool = False
    """Whether the rewards of the tokens of a rollout are scaled to variance 1, KL penalty included."""
    whiten_advantages: bool = True
    """Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens of a rollout."""
    gamma: float = 1.0
    """Discount of what comes a token later."""
    lam: float = 0.95
    """lambda of generalized advantage estimation, arXiv:1506.02438."""
    cliprange: float = 0.2
    """How far the ratio to the policy of the rollout may move, arXiv:1707.06347, Eq. 7."""
    dual_clip: float | None = None
    """Above 1: limits what tokens with a negative advantage count, arXiv:1912.09729, Eq. 4."""
    cliprange_value: float | None = 0.2
    """How far a value may move from that of the rollout; None for no limit."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, in nats per token, which is taken off the loss: above 0 it keeps completions
    diverse (arXiv:1707.06347, Eq. 9)."""
    value_warmup_steps: int = 0
    """First steps in which the value model learns alone."""
