"""Checks that a chat template says what the rows say, and that a model learns to end its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.errors import RequestError

_ROWS = 100  # looked at; a template is the same for all rows
_SHOWN = 60  # characters of a text in a message
_OTHERWISE = (
    "the chat template writes a prompt otherwise when no answer follows it: answers are learnt after another text than "
    "the one they are asked with"
)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: chat models name one, tokenizers another."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Whether the template of a tokenizer can write conversations and loses nothing of them.

    Args:
        rows: Rows whose columns are lists of messages, see data/formats.py.

    Returns:
        What is odd but can be trained on, for people.

    Raises:
        RequestError: The template refuses a row, or leaves out what somebody says in it.
    """
    notices: dict[str, None] = {}
    for number, row in zip(range(1, _ROWS + 1), rows, strict=False):
        for prompt, answer in _conversations(row):
            try:
                text = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
                asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError) as error:
                raise RequestError(
                    f"the chat template cannot write row {number}: {error}",
                    "take such rows out, or give another template with `model.chat_template=FILE`",
                ) from error
            for message in prompt + answer:
                # Templates of reasoning models leave out the thoughts of earlier turns, on purpose.
                if "<think>" not in message["content"] and message["content"].strip() not in text:
                    raise RequestError(
                        f"the chat template leaves out what the {message['role']} says in row {number}: "
                        f"{message['content'].strip()[:_SHOWN]!r}",
                        "give another template with `model.chat_template=FILE`",
                    )
            if prompt and answer and not text.startswith(asked):
                notices[_OTHERWISE] = None
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(text)["input_ids"]:
                notices[f"the tokenizer cannot write all characters: some become `{tokenizer.unk_token}`"] = None
    return list(notices)


def check_end_is_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]
) -> None:
    """A model that is never trained to end an answer talks on until it is cut off.

    Args:
        answers: The tokens that are trained on, of some rows; others may be -100.

    Raises:
        RequestError: No end token is among them.
    """
    ends = set(end_tokens(model, tokenizer))
    if not answers or any(not ends.isdisjoint(answer) for answer in answers):
        return
    first = tokenizer.decode([token for token in answers[0] if token >= 0][-8:])
    names = " or ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
    raise RequestError(
        f"the model would never learn to stop: no answer ends with {names or 'an end token'}; the first one that is "
        f"trained on ends with {first!r}",
        "name the token that ends an answer with `model.eos_token=...`, give a chat template that writes it with "
        "`model.chat_template=FILE`, or raise `max_length` if answers are cut before their end",
    )


def _conversations(row: Mapping[str, Any]) -> Iterator[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Prompt and answer of each conversation in a row, as messages."""
    if "messages" in row:
        yield row["messages"][:-1], row["messages"][-1:]
    for column in ("completion", "chosen", "rejected"):
        if column in row:
            yield row["prompt"], row[column]
