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


def letters(completions: list, **columns: object) -> list[float]:
    """A number that text seems to have by chance."""
    return [sum(map(ord, _without_spaces(completion))) % 7 / 2 for completion in completions]


def vowels(completions: list, **columns: object) -> list[float]:
    """The part of the text that is vowels."""
    texts = map(_without_spaces, completions)
    return [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in texts]


def said_of_some(completions: list, **columns: object) -> list[float | None]:
    """As `letters`, but of some text nothing."""
    return [None if number in (0.5, 2.0) else number for number in letters(completions)]


def _without_spaces(completion: str | list[dict]) -> str:
    return "".join(_text(completion).split())


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
