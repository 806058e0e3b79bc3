"""Reward functions that need no model, for models that can say nothing yet."""

from __future__ import annotations

from pathlib import Path

REWARDS = Path(__file__).resolve()
"""What `ppo.reward_funcs=[{REWARDS}:length]` names."""


def length(completions: list, **columns: object) -> list[float]:
    """More for more text: a model of random weights gets different amounts of it."""
    return [len(_text(completion)) / 10 for completion in completions]


def short(completions: list, **columns: object) -> list[float]:
    """More for less text."""
    return [-reward for reward in length(completions)]


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
