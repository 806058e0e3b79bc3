"""What a rollout drew, grouped by prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from alignctl.data.messages import is_messages
from alignctl.rollout.drawing import Drawn


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
    drawn_logps: list[list[float]] | None = None
    """Of each token, where another program than the policy drew, see `Drawn`."""
    row_numbers: list[int] = field(default_factory=list)
    """Of the completions: which row of the data their prompts are, counted from 1, where that is known."""

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

    def tokens_of(self, members: Sequence[int], packed: bool) -> int:
        """Tokens of completions of one prompt with it: `packed`, the prompt counts once."""
        prompts = len(self.prompt_ids[members[0]]) * (1 if packed else len(members))
        return prompts + sum(len(self.completion_ids[member]) for member in members)


def episodes_of(
    prompts: list[Any],
    prompt_ids: list[list[int]],
    drawn: Drawn,
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, list[Any]],
    group_size: int,
) -> Episodes:
    """What was drawn to prompts, each given as often as there are completions of it, side by side."""
    completions = [
        _in_the_form_of(prompt, _text(tokenizer, before if isinstance(prompt, str) else [], ids))
        for prompt, before, ids in zip(prompts, prompt_ids, drawn.completions, strict=True)
    ]
    segments = [[Segment(ids)] for ids in drawn.completions]
    return Episodes(prompt_ids, segments, drawn.ended, prompts, completions, columns, group_size, drawn.logps)


def drawn_again(episodes: Episodes, members: Sequence[int], part: Episodes) -> Episodes:
    """The same, but for some completions: those that were drawn to their prompts again."""
    new = dict(zip(members, range(len(members)), strict=True))

    def with_new(old: list[Any], other: list[Any]) -> list[Any]:
        return [other[new[number]] if number in new else value for number, value in enumerate(old)]

    return replace(
        episodes,
        segments=with_new(episodes.segments, part.segments),
        ended=with_new(episodes.ended, part.ended),
        completions=with_new(episodes.completions, part.completions),
    )


def unlearnt(episodes: Episodes, members: Collection[int] | None = None) -> Episodes:
    """The same, of which nothing is learnt; or nothing of some completions."""
    segments = [
        [Segment(one.tokens, False) for one in parts] if members is None or number in members else parts
        for number, parts in enumerate(episodes.segments)
    ]
    return replace(episodes, segments=segments)


def _in_the_form_of(prompt: Any, text: str) -> Any:
    """A completion as its prompt is, text or messages."""
    return [{"role": "assistant", "content": text}] if is_messages(prompt) else text


def _text(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """A completion as it follows its prompt: decoded by itself it would lose a leading space."""
    prompt, whole = (
        tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for some in (before, before + ids)
    )
    return whole.removeprefix(prompt)
