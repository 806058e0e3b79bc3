"""One name for what methods that draw completions log under names of their own: so runs of any of them are read and
compared alike. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping

COMMON = {
    "rollout/reward": ("reward", "score"),
    "rollout/reward_std": ("reward_std", "score_std"),
    "rollout/kl": ("kl/k1",),
    "rollout/entropy": ("entropy",),
    "rollout/length": ("completions/mean_length", "completion_length"),
}
"""The common names, and those of which each is taken: the first that there is. KL is to the reference, in nats per
completion; entropy in nats per token; length in tokens."""


def common_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """What a log says under the common names."""
    found = {name: next((logs[one] for one in others if one in logs), None) for name, others in COMMON.items()}
    return {name: value for name, value in found.items() if value is not None}
