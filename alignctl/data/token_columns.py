"""Rows as the token ids that TRL's trainers (1.16) make of them, many rows at once. Torch-free.

The same ids as of TRL's `_prepare_dataset`. Each kind of columns says which texts a row is written as, what becomes of
their ids, and what a limit leaves of them. Rows that are lost are those that TRL drops, and those of which
`truncation_mode=keep_end` leaves no prompt, which TRL trains on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from alignctl.data.encoding import Ids
from alignctl.data.lengths import NEVER
from alignctl.data.messages import is_messages
from alignctl.data.tokenizing import common_prefix, ended, text_ids

TEXTS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
"""Columns that token ids are made of."""
TOOLS = "tools"
"""Column of what an answer may call, which templates write."""

_IGNORED = -100  # among labels


@dataclass(frozen=True)
class TokenColumns(ABC):
    """What a trainer's rows are made of."""

    max_length: int | None
    """Longest that a row may be; None for any."""

    answers: ClassVar[tuple[str, ...]]
    """Columns of what follows a prompt."""
    knows_prompt: ClassVar[bool] = True
    """Whether it matters where the prompt ends, so that it is a text by itself, too."""
    names: ClassVar[tuple[str, ...]]
    """Of the columns that are made."""
    why_lost: ClassVar[str] = "nothing of a completion is left"
    """What makes rows be lost, in words."""

    @abstractmethod
    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        """The columns of a row, whole, from the ids of its texts, the longest part of the prompt first."""

    @abstractmethod
    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        """What a row with such columns needs so as not to be lost, and so as not to be cut; see RowLengths."""

    def cut(self, columns: tuple[Ids, ...]) -> tuple[Ids, ...]:
        """The columns as they are handed on: trainers of TRL cut most in their collators."""
        return columns

    def fits(self, tokenizer: Any, row: dict[str, Any]) -> bool:
        """Whether a row would not be lost."""
        [texts] = self.written(tokenizer, {name: [row[name]] for name in (*TEXTS, TOOLS) if name in row}, None)
        plain = not any(is_messages(row.get(name)) for name in TEXTS)
        least, _ = self.needed(self.of([text_ids(tokenizer, text, special=plain) for text in texts]))
        return least <= (NEVER - 1 if self.max_length is None else self.max_length)

    def written(self, tokenizer: Any, rows: dict[str, list[Any]], template: str | None) -> list[tuple[str, ...]]:
        """The texts of each row: its prompt where that matters, and each answer after it.

        Args:
            template: A chat template, in place of the tokenizer's own.
        """
        return list(zip(*self._written(tokenizer, rows, template), strict=True))

    def _written(self, tokenizer: Any, rows: dict[str, list[Any]], template: str | None) -> Iterator[list[str]]:
        prompts = rows.get("prompt")
        answers = [rows[name] for name in (self.answers if prompts else ("messages", "text")) if name in rows]
        conversations = is_messages((prompts or answers[0])[0])
        if not conversations:
            answers = [[ended(answer, tokenizer.eos_token) for answer in column] for column in answers]
        if prompts:
            answers = [[p + a for p, a in zip(prompts, column, strict=True)] for column in answers]
        rendered = partial(_rendered, tokenizer, rows.get(TOOLS), template)
        if prompts and self.knows_prompt:
            yield rendered(prompts, add_generation_prompt=True) if conversations else prompts
        for column in answers:
            yield rendered(column) if conversations else column


@dataclass(frozen=True)
class PairIds(TokenColumns):
    """Of pairs, for `trl.DPOTrainer`."""

    truncation_mode: str

    answers = ("chosen", "rejected")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    @property
    def why_lost(self) -> str:
        return _why_lost(self.truncation_mode)

    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        prompt, *wholes = ids
        start = min(common_prefix(prompt, whole) for whole in wholes)
        return prompt[:start], *(whole[start:] for whole in wholes)

    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        prompt, *answers = map(len, columns)
        return _needed(prompt, max(answers), self.truncation_mode), prompt + max(answers)


@dataclass(frozen=True)
class AnswerIds(TokenColumns):
    """Of labelled completions, for `trl.KTOTrainer`."""

    answers = ("completion",)
    names = ("prompt_ids", "completion_ids")

    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        prompt, whole = ids
        start = common_prefix(prompt, whole)
        return prompt[:start], whole[start:]

    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        prompt, answer = map(len, columns)
        return _needed(prompt, answer, "keep_start"), prompt + answer


@dataclass(frozen=True)
class ScoredIds(TokenColumns):
    """Of pairs to be scored as a whole, for `trl.RewardTrainer`."""

    answers = ("chosen", "rejected")
    knows_prompt = False
    names = ("chosen_ids", "rejected_ids")
    why_lost = "a completion with its prompt is longer"

    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        return tuple(ids)

    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        return (longest := max(map(len, columns)), longest)


@dataclass(frozen=True)
class PromptIds(TokenColumns):
    """Of prompts to answer, which are never cut."""

    answers = ()
    names = ("prompt_ids",)
    why_lost = "the prompt is longer"

    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        return tuple(ids)

    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        [prompt] = map(len, columns)
        return prompt or NEVER, prompt


@dataclass(frozen=True)
class LabelledIds(TokenColumns):
    """Of demonstrations, for `trl.SFTTrainer`."""

    truncation_mode: str
    completion_only: bool
    packed: bool
    """Rows are cut while they are packed, after this."""
    marked: bool = False
    """A template says what is trained on, of one conversation at a time: TRL asks it."""

    answers = ("completion",)
    names = ("input_ids", "labels")

    @property
    def why_lost(self) -> str:
        return _why_lost(self.truncation_mode)

    def of(self, ids: list[Ids]) -> tuple[Ids, ...]:
        *prompt, whole = ids
        start = common_prefix(prompt[0], whole) if prompt and self.completion_only else 0
        return whole, [_IGNORED] * start + whole[start:]

    def needed(self, columns: tuple[Ids, ...]) -> tuple[int, int]:
        """What is trained on from its first token is a text, of which any part will do. With `keep_end` the prompt is
        all before the last answer."""
        ids, labels = columns
        start = next((place for place, label in enumerate(labels) if label != _IGNORED), None)
        if start is None:
            return NEVER, len(ids)
        if self.truncation_mode == "keep_end" and start:
            last = next(place for place in range(len(ids) - 1, -1, -1) if labels[place] != _IGNORED)
            start = next(place for place in range(last, 0, -1) if labels[place - 1] == _IGNORED)
        return _needed(start, len(ids) - start, self.truncation_mode), len(ids)

    def cut(self, columns: tuple[Ids, ...]) -> tuple[Ids, ...]:
        if self.max_length is None or self.packed:
            return columns
        kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        ids, labels = columns
        return ids[kept], labels[kept]


def _needed(prompt: int, answer: int, truncation_mode: str) -> int:
    """Tokens with which something of both is left, where there is a prompt."""
    return 1 + (answer if truncation_mode == "keep_end" else prompt) if prompt else 1


def _why_lost(truncation_mode: str) -> str:
    kept_end = "nothing of the prompt is left before a completion"
    return kept_end if truncation_mode == "keep_end" else TokenColumns.why_lost


def _rendered(
    tokenizer: Any, tools: list[Any] | None, template: str | None, conversations: list[Any], **options: Any
) -> list[str]:
    render = partial(tokenizer.apply_chat_template, tokenize=False, chat_template=template, **options)
    if tools is None:
        return render(conversations)
    return [render(one, tools=its) for one, its in zip(conversations, tools, strict=True)]
