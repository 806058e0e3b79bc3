"""Rows as the token ids that TRL's trainers (1.16) make of them, many rows at once. Torch-free.

The same ids as of TRL's `_prepare_dataset`, and the same rows dropped. Each kind of columns says which texts a row is
written as, and what becomes of their ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from alignctl.data.encoding import Ids
from alignctl.data.messages import is_messages
from alignctl.data.tokenizing import common_prefix, ended

TEXTS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
"""Columns that token ids are made of."""

_IGNORED = -100  # among labels


@dataclass(frozen=True)
class TokenColumns(ABC):
    """What a trainer's rows are made of."""

    max_length: int | None

    answers: ClassVar[tuple[str, ...]]
    """Columns of what follows a prompt."""
    knows_prompt: ClassVar[bool] = True
    """Whether it matters where the prompt ends, so that it is a text by itself, too."""
    names: ClassVar[tuple[str, ...]]
    """Of the columns that are made."""

    @abstractmethod
    def of(self, ids: list[Ids]) -> tuple[Ids, ...] | None:
        """The columns of a row, from the ids of its texts, the longest part of the prompt first; None where the row is
        dropped."""

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
        if prompts and self.knows_prompt:
            yield _rendered(tokenizer, prompts, template, add_generation_prompt=True) if conversations else prompts
        for column in answers:
            yield _rendered(tokenizer, column, template) if conversations else column


@dataclass(frozen=True)
class PairIds(TokenColumns):
    """Of pairs, for `trl.DPOTrainer`."""

    truncation_mode: str

    answers = ("chosen", "rejected")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    def of(self, ids: list[Ids]) -> tuple[Ids, ...] | None:
        prompt, *wholes = ids
        start = min(common_prefix(prompt, whole) for whole in wholes)
        if self.max_length is not None and self.truncation_mode == "keep_start" and start >= self.max_length:
            return None
        return prompt[:start], *(whole[start:] for whole in wholes)


@dataclass(frozen=True)
class AnswerIds(TokenColumns):
    """Of labelled completions, for `trl.KTOTrainer`."""

    answers = ("completion",)
    names = ("prompt_ids", "completion_ids")

    def of(self, ids: list[Ids]) -> tuple[Ids, ...] | None:
        prompt, whole = ids
        start = common_prefix(prompt, whole)
        if self.max_length is not None and start >= self.max_length:
            return None
        return prompt[:start], whole[start:]


@dataclass(frozen=True)
class ScoredIds(TokenColumns):
    """Of pairs to be scored as a whole, for `trl.RewardTrainer`."""

    answers = ("chosen", "rejected")
    knows_prompt = False
    names = ("chosen_ids", "rejected_ids")

    def of(self, ids: list[Ids]) -> tuple[Ids, ...] | None:
        return None if self.max_length is not None and max(map(len, ids)) > self.max_length else tuple(ids)


@dataclass(frozen=True)
class LabelledIds(TokenColumns):
    """Of demonstrations, for `trl.SFTTrainer`."""

    truncation_mode: str
    completion_only: bool
    packed: bool
    """Rows are cut while they are packed, after this."""

    answers = ("completion",)
    names = ("input_ids", "labels")

    def of(self, ids: list[Ids]) -> tuple[Ids, ...] | None:
        *prompt, whole = ids
        start = common_prefix(prompt[0], whole) if prompt and self.completion_only else 0
        labels = [_IGNORED] * start + whole[start:]
        if self.max_length is None or self.packed:
            return whole, labels
        kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        labels = labels[kept]
        return (whole[kept], labels) if any(label != _IGNORED for label in labels) else None


def _rendered(tokenizer: Any, conversations: list[Any], template: str | None, **options: Any) -> list[str]:
    return tokenizer.apply_chat_template(conversations, tokenize=False, chat_template=template, **options)
