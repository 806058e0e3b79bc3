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

    prompt_ids: list[list[int]]
    segments: list[list[Segment]]
    """The completions in parts, with the end token where there is one. What is drawn in one go is one segment."""
    ended: list[bool]
    """Whether a completion ended by itself."""
    prompts: list[Any]
    """As the rows have them, text or messages."""
    completions: list[Any]
    """In the form of their prompts."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the rows, by name."""
    group_size: int = 1

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        return [[token for segment in parts for token in segment.tokens] for parts in self.segments]

    @cached_property
    def trained(self) -> list[list[bool]]:
        """Of each token of each completion, whether the policy learns from it."""
        return [[segment.trained for segment in parts for _ in segment.tokens] for parts in self.segments]

    @cached_property
    def groups(self) -> list[range]:
        """Numbers of the completions of each prompt."""
        return [range(first, first + self.group_size) for first in range(0, len(self.prompt_ids), self.group_size)]

    def tokens_of(self, group: int) -> int:
        """Tokens of a group whose prompt is computed once."""
        members = self.groups[group]
        return len(self.prompt_ids[members[0]]) + sum(len(self.completion_ids[member]) for member in members)


def in_the_form_of(prompt: Any, text: str) -> Any:
    """A completion as its prompt is, text or messages."""
    return [{"role": "assistant", "content": text}] if is_messages(prompt) else text
