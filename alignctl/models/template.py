"""Checks that a chat template says what the rows say, and that a model learns to end its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.errors import RequestError

Messages = list[dict[str, str]]

_ROWS = 100  # looked at closely
_LAST = 4  # tokens: templates write a line break after the end token
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


def check_template(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]]
) -> tuple[dict[int, str], list[str]]:
    """Whether the template of a tokenizer can write conversations and loses nothing of them.

    Args:
        rows: Rows whose columns are lists of messages, see data/formats.py. All of them are written, since a template
            may refuse some (a system message, two turns of the same speaker); the first ones are looked at closely.

    Returns:
        The rows that it refuses, by position, with the reason; and what is odd but can be trained on, for people.

    Raises:
        RequestError: The template leaves out what somebody says.
    """
    refused: dict[int, str] = {}
    notices: dict[str, None] = {}
    for position, row in enumerate(rows):
        for prompt, answer in _conversations(row):
            try:
                text = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
            except (TemplateError, ValueError) as error:
                refused[position] = str(error)
                break
            if position < _ROWS:
                notices |= dict.fromkeys(_look_closely(tokenizer, prompt, answer, text, position + 1))
    return refused, list(notices)


def _look_closely(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: Messages, text: str, number: int
) -> Iterator[str]:
    """What is odd about how a conversation is written as `text`."""
    for message in prompt + answer:
        # Templates of reasoning models leave out the thoughts of earlier turns, on purpose.
        if "<think>" not in message["content"] and message["content"].strip() not in text:
            raise RequestError(
                f"the chat template leaves out what the {message['role']} says in row {number}: "
                f"{message['content'].strip()[:_SHOWN]!r}",
                "give another template with `model.chat_template=FILE`",
            )
    if (
        prompt
        and answer
        and not text.startswith(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    ):
        yield _OTHERWISE
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(text)["input_ids"]:
        yield f"the tokenizer cannot write all characters: some become `{tokenizer.unk_token}`"


def check_end_is_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]], anywhere: bool = False
) -> None:
    """A model that is never trained to end an answer talks on until it is cut off.

    Args:
        answers: The tokens that are trained on, of some rows that are not cut; others may be -100.
        anywhere: Whether an end token may stand anywhere in a row, which is several rows packed, and not at its end.

    Raises:
        RequestError: No answer ends with an end token.
    """
    ends = set(end_tokens(model, tokenizer))
    trained = [tokens for tokens in ([token for token in answer if token >= 0] for answer in answers) if tokens]
    last = 0 if anywhere else -_LAST
    if not trained or any(not ends.isdisjoint(tokens[last:]) for tokens in trained):
        return
    names = " or ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
    raise RequestError(
        f"the model would never learn to stop: no answer ends with {names or 'an end token'}; the first one that is "
        f"trained on ends with {tokenizer.decode(trained[0][-8:])!r}",
        "name the token that ends an answer with `model.eos_token=...`, or give a chat template that writes it with "
        "`model.chat_template=FILE`",
    )


def _conversations(row: Mapping[str, Any]) -> Iterator[tuple[Messages, Messages]]:
    """Prompt and answer of each conversation in a row, as messages."""
    if "messages" in row:
        yield row["messages"][:-1], row["messages"][-1:]
    answers = [row[column] for column in ("completion", "chosen", "rejected") if column in row]
    for answer in answers or ([[]] if "prompt" in row else []):
        yield row["prompt"], answer
