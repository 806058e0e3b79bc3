"""Held-out rows as what is measured on: pairs, labelled answers, and questions to answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignctl.data.rows import Rows
from alignctl.data.tokenizing import Answer, cut, tokenize_completions, tokenize_prompt


@dataclass(frozen=True)
class Lengths:
    """How long rows may be, in tokens, and what becomes of longer ones."""

    seen: int | None
    """Longest sequence that the model sees; None for any."""
    max_length: int | None = None
    """Longest prompt with its completion; None for what the model sees."""
    truncation_mode: str = "keep_start"
    """What is kept of longer ones: `keep_start` or `keep_end`."""
    longest_prompt: int | None = None
    """Of prompts to answer, in tokens; None for what leaves enough of what the model sees."""
    drops_longer: bool = False
    """Longer ones are left out instead of cut, as TRL does for reward models."""

    def cut(self, prompt: list[int], completion: list[int]) -> Answer | None:
        """Prompt and completion as they are measured; None where the row is left out."""
        longest = self.seen if self.max_length is None else self.max_length
        if self.drops_longer and longest is not None and len(prompt) + len(completion) > longest:
            return None
        return cut(prompt, completion, longest, self.truncation_mode)


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
    given: list[Any]
    """As the rows have them, text or messages."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What the rows have beside them, by name: for functions that score answers."""
    numbers: list[int] = field(default_factory=list)
    """Of their rows among the held-out ones; empty where these have none."""


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on; a part is None where there are no such rows or it is not wanted."""

    pairs: Pairs | None = None
    feedback: Feedback | None = None
    questions: Questions | None = None


def build_held_out(
    rows: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    num_questions: int,
    max_new_tokens: int,
    lost: Collection[int] = (),
) -> HeldOut:
    """What rows give to measure on: pairs or labelled answers by their kind, and questions wherever there are prompts.

    Args:
        rows: Held-out rows as the tokenizer can write them; None where none are.
        num_questions: Most prompts to answer; 0 for none, as for a model that cannot answer.
        max_new_tokens: Tokens to leave for an answer, of what the model sees.
        lost: Numbers of rows of which the trainer would leave nothing: their prompts are not asked. Of pairs and
            answers `lengths` says it, of each by itself.
    """
    if rows is None:
        return HeldOut()
    kind, dataset = rows.format.kind, rows.dataset
    left = rows.select([i for i, number in enumerate(rows.numbers) if number not in lost]) if lost else rows
    room = lengths.seen - max_new_tokens if lengths.seen else None
    longest = min((one for one in (room, lengths.longest_prompt) if one is not None), default=None)
    columns = [column.name for column in rows.columns if column.name in dataset.column_names]
    asks = num_questions and "prompt" in dataset.column_names
    return HeldOut(
        pairs=build_pairs(dataset, tokenizer, lengths) if kind == "preferences" else None,
        feedback=build_feedback(dataset, tokenizer, lengths) if kind == "feedback" else None,
        questions=(
            build_questions(left.dataset, tokenizer, num_questions, longest, columns, left.numbers) if asks else None
        ),
    )


def build_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, lengths: Lengths) -> Pairs | None:
    """Rows {prompt, chosen, rejected} of which both completions are there after cutting; None where none is."""
    pairs = Pairs([], [])
    for row in rows:
        both = [row["chosen"], row["rejected"]]
        prompt, completions = tokenize_completions(tokenizer, row["prompt"], both, row.get("tools"))
        chosen, rejected = (lengths.cut(prompt, completion) for completion in completions)
        if chosen and rejected:
            pairs.chosen.append(chosen)
            pairs.rejected.append(rejected)
    return pairs if pairs.chosen else None


def build_feedback(rows: Dataset, tokenizer: PreTrainedTokenizerBase, lengths: Lengths) -> Feedback | None:
    """Rows {prompt, completion, label} of which the completion is there after cutting; None where none is."""
    feedback = Feedback([], [])
    for row in rows:
        prompt, (completion,) = tokenize_completions(tokenizer, row["prompt"], [row["completion"]], row.get("tools"))
        if answer := lengths.cut(prompt, completion):
            feedback.answers.append(answer)
            feedback.labels.append(row["label"])
    return feedback if feedback.answers else None


def build_questions(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int | None,
    columns: Sequence[str] = (),
    numbers: Sequence[int] = (),
) -> Questions | None:
    """The first distinct prompts of rows, text or messages, that leave enough for an answer.

    Args:
        count: At most so many.
        longest: Longest prompt in tokens; None for any.
        columns: To be taken from the rows, too.
        numbers: Of the rows, where they have some.
    """
    questions, seen = Questions([], [], [], {name: [] for name in columns}), set()
    for place, row in enumerate(rows):
        if len(questions.prompts) >= count:
            break
        prompt = row["prompt"]
        ids = tokenize_prompt(tokenizer, prompt, row.get("tools"))
        if ids and tuple(ids) not in seen and (longest is None or len(ids) <= longest):
            seen.add(tuple(ids))
            questions.texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
            questions.prompts.append(ids)
            questions.given.append(prompt)
            questions.numbers.extend(numbers[place : place + 1])
            for name, values in questions.columns.items():
                values.append(row[name])
    return questions if questions.prompts else None
