"""What a stage reads, made: a tokenizer whose words are numbered, and rows of a given length."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from alignctl.data.formats import detect_format
from alignctl.data.reading import Ledger, Rows

_UNKNOWN, _PADDING, _END = range(3)
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
)
_PROMPT = 4  # of so many parts of a row, one is the prompt: branches of a pair then share less than they have


def stand_in(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, `t0`, `t1` and so on, each of them a token."""
    words = Tokenizer(WordLevel({_word(number): number for number in range(vocabulary)}, unk_token=_word(_UNKNOWN)))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=_word(_UNKNOWN),
        pad_token=_word(_PADDING),
        eos_token=_word(_END),
        chat_template=_TEMPLATE,
    )


def made_rows(kind: str, count: int, tokens: int, vocabulary: int) -> Rows:
    """Rows of a kind, different ones, each sequence of so many tokens."""
    rows = [_row(kind, number, tokens, vocabulary) for number in range(count)]
    ledger = Ledger("made rows", kind, count, count, {})
    return Rows(Dataset.from_list(rows), detect_format(rows, kind, "auto"), ledger, list(range(1, count + 1)))


def _row(kind: str, number: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    prompt = max(1, tokens // _PROMPT)
    answer = max(1, tokens - prompt - 1)  # and its end

    def message(role: str, length: int, begin: int) -> list[dict[str, str]]:
        ids = (_END + 1 + (begin + step) % (vocabulary - _END - 1) for step in range(length))
        return [{"role": role, "content": " ".join(map(_word, ids))}]

    row: dict[str, Any] = {"prompt": message("user", tokens if kind == "prompts" else prompt, number)}
    if kind == "preferences":
        return row | {key: message("assistant", answer, number + i) for i, key in enumerate(("chosen", "rejected"), 1)}
    if kind != "prompts":
        row["completion"] = message("assistant", answer, number)
    return row | ({"label": number % 2 == 0} if kind == "feedback" else {})


def _word(number: int) -> str:
    return f"t{number}"
