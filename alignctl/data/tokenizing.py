"""Rows as token ids, cut as the trainers cut them. Torch-free: works with any tokenizer that is passed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from alignctl.data.messages import Messages, is_messages


class Answer(NamedTuple):
    """A completion after its prompt, as token ids; both have at least one."""

    prompt: list[int]
    completion: list[int]


def tokenize_prompt(tokenizer: Any, prompt: str | Messages, tools: Any = None) -> list[int]:
    """A prompt as a policy is asked it; `tools` are those that a template is to write."""
    if is_messages(prompt):
        return _template_ids(tokenizer, prompt, tools=tools, add_generation_prompt=True)
    return text_ids(tokenizer, prompt)


def tokenize_completions(
    tokenizer: Any, prompt: str | Messages, completions: Sequence[str | Messages], tools: Any = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of completions to it, the way TRL's preference trainers make them.

    Prompt and completion are tokenised together. A completion starts where they part from the prompt alone: templates
    may write a prompt otherwise when an answer follows, and tokens may merge across the border. Plain text gets the end
    token, messages what their template writes.
    """
    prompt_ids = tokenize_prompt(tokenizer, prompt, tools)
    if is_messages(prompt):
        whole = [_template_ids(tokenizer, prompt + completion, tools=tools) for completion in completions]
    else:
        whole = [text_ids(tokenizer, prompt + ended(completion, tokenizer.eos_token)) for completion in completions]
    start = min(common_prefix(prompt_ids, ids) for ids in whole)
    return prompt_ids[:start], [ids[start:] for ids in whole]


def cut(prompt: list[int], completion: list[int], max_length: int | None, truncation_mode: str) -> Answer | None:
    """An answer cut to a length, prompt and completion together; None where nothing of one of them is left.

    Args:
        truncation_mode: `keep_start` or `keep_end`.
    """
    ids, start = prompt + completion, len(prompt)
    if max_length is not None and len(ids) > max_length:
        dropped = len(ids) - max_length if truncation_mode == "keep_end" else 0
        if 0 < start <= dropped:
            return None
        ids, start = ids[dropped:][:max_length], start - dropped
    start = max(start, 1)  # the first token of all follows nothing, so it cannot be predicted
    return Answer(ids[:start], ids[start:]) if start < len(ids) else None


def _template_ids(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def text_ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, with what the tokenizer puts before it and without an end token that it puts behind it.

    Args:
        special: Whether the tokens that the tokenizer puts around a text are wanted; templates write their own.
    """
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return without_added_end(tokenizer, text, ids) if special else ids


def without_added_end(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Ids of a text without the end token that some tokenizers put behind every text: prompts do not end, and answers
    bring theirs along."""
    end, token = tokenizer.eos_token_id, tokenizer.eos_token
    last = 2 if token and text.endswith(token) else 1
    is_added = end is not None and len(ids) > last and ids[-last:] == [end] * last and not text.endswith(token * last)
    return ids[:-1] if is_added else ids


def ended(text: str, end: str) -> str:
    """Text with the end token behind it, once."""
    return text if text.endswith(end) else text + end


def common_prefix(ids: list[int], others: list[int]) -> int:
    """Number of leading tokens two sequences share."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
