"""Held-out rows as what is measured on: pairs, labelled answers, and questions to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignctl.data.tokenizing import Answer, cut, tokenize_completions, tokenize_prompt

Cut = Callable[[list[int], list[int]], Answer | None]
"""Cuts prompt and completion as the trainer does; None drops the row."""


@dataclass(frozen=True)
class Pairs:
    """Held-out preference pairs."""

    chosen: list[Answer]
    rejected: list[Answer]


@dataclass(frozen=True)
class Feedback:
    """Held-out answers with labels."""

    answers: list[Answer]
    labels: list[bool]


@dataclass(frozen=True)
class Questions:
    """Held-out prompts to answer."""

    texts: list[str]
    """The last user message, or the whole prompt where it is plain text: what a judge is shown."""
    prompts: list[list[int]]
    """Token ids."""


@dataclass(frozen=True)
class HeldOut:
    """What a stage is measured on; a part is None where there are no such rows or it is not wanted."""

    pairs: Pairs | None = None
    feedback: Feedback | None = None
    questions: Questions | None = None


def build_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, cut_answer: Cut) -> Pairs | None:
    """Rows {prompt, chosen, rejected} of which both completions are there after cutting; None where none is."""
    pairs = Pairs([], [])
    for row in rows:
        prompt, completions = tokenize_completions(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        chosen, rejected = (cut_answer(prompt, completion) for completion in completions)
        if chosen and rejected:
            pairs.chosen.append(chosen)
            pairs.rejected.append(rejected)
    return pairs if pairs.chosen else None


def build_feedback(rows: Dataset, tokenizer: PreTrainedTokenizerBase, cut_answer: Cut) -> Feedback | None:
    """Rows {prompt, completion, label} of which the completion is there after cutting; None where none is."""
    feedback = Feedback([], [])
    for row in rows:
        prompt, (completion,) = tokenize_completions(tokenizer, row["prompt"], [row["completion"]])
        if answer := cut_answer(prompt, completion):
            feedback.answers.append(answer)
            feedback.labels.append(row["label"])
    return feedback if feedback.answers else None


def build_questions(
    prompts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, count: int, room: int | None
) -> Questions | None:
    """The first distinct prompts, text or messages, that leave room for an answer.

    Args:
        count: At most so many.
        room: Longest prompt in tokens; None for any.
    """
    questions, seen = Questions([], []), set()
    for prompt in prompts:
        if len(questions.prompts) >= count:
            break
        ids = tokenize_prompt(tokenizer, prompt)
        if ids and tuple(ids) not in seen and (room is None or len(ids) <= room):
            seen.add(tuple(ids))
            questions.texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
            questions.prompts.append(ids)
    return questions if questions.prompts else None


def cutter(max_length: int | None, truncation_mode: str, drops_longer: bool) -> Cut:
    """How a trainer cuts. `drops_longer`: it takes no row that is too long, instead of cutting it."""

    def cut_answer(prompt: list[int], completion: list[int]) -> Answer | None:
        if drops_longer and max_length is not None and len(prompt) + len(completion) > max_length:
            return None
        return cut(prompt, completion, max_length, truncation_mode)

    return cut_answer
