"""What a stage reads, made: a tokenizer whose words are numbered, and rows of a given length."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from alignctl.data.formats import detect_format
from alignctl.data.rows import Ledger, Rows
from alignctl.rollout.drawing import Drawn

_SPECIAL = _UNKNOWN, _PADDING, _END = "<unknown>", "<padding>", "<end>"
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
)
_PROMPT = 4  # of so many parts of a row, one is the prompt: branches of a pair then share less than they have


def stand_in(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, each of them a token: three special ones, `t3`, `t4` and so on."""
    words = [*_SPECIAL, *map(_word, range(len(_SPECIAL), vocabulary))]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=_UNKNOWN))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=_UNKNOWN, pad_token=_PADDING, eos_token=_END, chat_template=_TEMPLATE
    )


def made_rows(kind: str, count: int, tokens: int, vocabulary: int) -> Rows:
    """Rows of a kind, different ones, each sequence of so many tokens."""
    rows = [_row(kind, number, tokens, vocabulary) for number in range(count)]
    ledger = Ledger("made rows", kind, count, count, {})
    return Rows(Dataset.from_list(rows), detect_format(rows, kind, "auto"), ledger, list(range(1, count + 1)))


def made_completions(count: int, tokens: int, vocabulary: int) -> Drawn:
    """Completions, each other than the one before it, that were not ended by themselves."""
    ids = range(len(_SPECIAL), vocabulary)
    made = [[ids[(number + step) % len(ids)] for step in range(tokens)] for number in range(count)]
    return Drawn(made, [False] * count)


def _row(kind: str, number: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    prompt = max(1, tokens // _PROMPT)
    answer = max(1, tokens - prompt - 2)  # its end, and one that a trainer may put behind it

    def message(role: str, length: int, begin: int) -> list[dict[str, str]]:
        first = len(_SPECIAL)
        ids = (first + (begin + step) % (vocabulary - first) for step in range(length))
        return [{"role": role, "content": " ".join(map(_word, ids))}]

    row: dict[str, Any] = {"prompt": message("user", tokens if kind == "prompts" else prompt, number)}
    if kind == "preferences":
        return row | {key: message("assistant", answer, number + i) for i, key in enumerate(("chosen", "rejected"), 1)}
    if kind != "prompts":
        row["completion"] = message("assistant", answer, number)
    return row | ({"label": number % 2 == 0} if kind == "feedback" else {})


def _word(number: int) -> str:
    return f"t{number}"
