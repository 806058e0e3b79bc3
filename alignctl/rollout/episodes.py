"""What a rollout drew, grouped by prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from alignctl.data.messages import is_messages


class Segment(NamedTuple):
    """A part of a completion."""

    tokens: list[int]
    trained: bool = True
    """Whether the policy wrote it, and so learns from it."""


@dataclass(frozen=True)
class Episodes:
    """Prompts and what was drawn to them. Lists have an element for each completion; those of one prompt, as many as
    `group_size`, stand side by side."""

    prompts: list[list[int]]
    """Token ids."""
    segments: list[list[Segment]]
    """The completions in parts, with the end token where there is one. What is drawn in one go is one segment."""
    ended: list[bool]
    """Whether a completion ended by itself."""
    asked: list[Any]
    """The prompts as the rows have them, text or messages."""
    said: list[Any]
    """The completions in the same form."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the rows, by name."""
    group_size: int = 1

    @cached_property
    def completions(self) -> list[list[int]]:
        """Token ids."""
        return [[token for segment in parts for token in segment.tokens] for parts in self.segments]

    @cached_property
    def trained(self) -> list[list[bool]]:
        """Of each token of each completion, whether the policy learns from it."""
        return [[segment.trained for segment in parts for _ in segment.tokens] for parts in self.segments]

    @cached_property
    def groups(self) -> list[range]:
        """Numbers of the completions of each prompt."""
        return [range(first, first + self.group_size) for first in range(0, len(self.prompts), self.group_size)]

    def tokens_of(self, group: int) -> int:
        """Tokens of a group whose prompt is computed once."""
        members = self.groups[group]
        return len(self.prompts[members[0]]) + sum(len(self.completions[member]) for member in members)


def as_said(asked: Any, text: str) -> Any:
    """A completion in the form of its prompt."""
    return [{"role": "assistant", "content": text}] if is_messages(asked) else text
