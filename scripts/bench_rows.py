"""Rows for bench_preference.py, and the tokenizers that go with them: real ones of hh-rlhf, and made ones that need no
data set. The words of made rows are a token each, so that their lengths are exact.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REAL = ("harmless", "helpful")
MADE = ("unshared", "ultrafeedback", "long")
VOCABULARY = 8192
_SPECIAL = ("<pad>", "<eos>", "<unk>")
_UNSHARED_TOKENS = 200
# UltraFeedback (arXiv:2310.01377, Table 1): mean tokens of a prompt and of a completion, taken as log-normal. With
# these spreads, part of which a pair's completions have in common, rows cut at 1,024 tokens come to what those of
# HuggingFaceH4/ultrafeedback_binarized have in Llama 3's tokens: 716 a pair, prompts counted once, and 1,377 padded in
# batches of two pairs, 2,005 in batches of sixteen (here 719, 1,380 and 2,017).
_PROMPT, _COMPLETION = (185.1, 1.0), (305.3, 0.9)
_IN_COMMON = 0.45

Pair = dict[str, str]


def make_tokenizer(data: str) -> Any:
    """Byte-level BPE learnt from hh-rlhf for its rows, words for made ones."""
    if data in REAL:
        from alignctl.models.tokenizer import train_tokenizer

        return train_tokenizer((line["chosen"] for part in REAL for line in _hh_lines(part)), VOCABULARY)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_SPECIAL, *_words()])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def rows_of(method: str, data: str, count: int, max_length: int, length: int) -> list[dict[str, Any]]:
    """The rows that all contestants train on.

    Args:
        max_length: What rows are cut at, in tokens; real ones are chosen so that none is cut.
        length: Of the rows of `long`, in tokens.
    """
    pairs = {
        "unshared": lambda: _unshared(count), "ultrafeedback": lambda: _ultrafeedback(count, max_length),
        "long": lambda: _long(count, length),
    }.get(data, lambda: _hh_pairs(data, count, max_length))()  # fmt: skip
    return [_as_row(method, pair, wanted=index % 2 == 0) for index, pair in enumerate(pairs)]


def _as_row(method: str, pair: Pair, wanted: bool) -> dict[str, Any]:
    if method not in ("kto", "sft"):
        return dict(pair)
    row = {"prompt": pair["prompt"], "completion": pair["chosen" if wanted or method == "sft" else "rejected"]}
    return row | {"label": wanted} if method == "kto" else row


def _hh_pairs(data: str, count: int, max_length: int) -> list[Pair]:
    """The first rows of hh-rlhf whose completions differ from the last turn on and that need not be cut."""
    pairs = []
    for line in _hh_lines(data):
        (prompt, mark, chosen), (same, _, rejected) = (
            line[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
        )
        fits = max(map(len, (line["chosen"], line["rejected"]))) < 3 * max_length  # a token is longer
        if prompt == same and fits and chosen.strip() and rejected.strip():
            pairs.append({"prompt": prompt + mark, "chosen": chosen, "rejected": rejected})
        if len(pairs) == count:
            break
    return pairs


def _hh_lines(data: str) -> list[dict[str, str]]:
    """The first rows of a part of hh-rlhf."""
    shared = os.environ.get("ALIGNCTL_SHARED", ROOT.parent / "shared")
    file = Path(shared, "data", "preference", f"hh_{data}_base", "train.jsonl")
    if file.exists():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    from datasets import load_dataset

    return list(load_dataset("Anthropic/hh-rlhf", data_dir=f"{data}-base", split="train[:2000]"))


def _unshared(count: int) -> Iterator[Pair]:
    """Pairs whose prompts are one word and whose completions are all of one length."""
    draw = random.Random(0)
    for _ in range(count):
        yield _pair(draw, 1, _UNSHARED_TOKENS, _UNSHARED_TOKENS)


def _ultrafeedback(count: int, max_length: int) -> Iterator[Pair]:
    """Pairs with the lengths of UltraFeedback, as they are after they are cut."""
    draw = random.Random(0)
    for _ in range(count):
        prompt = min(_log_normal(*_PROMPT, draw.gauss(0, 1)), max_length - 2)
        common = draw.gauss(0, 1)
        completions = []
        for _ in range(2):
            deviation = sqrt(_IN_COMMON) * common + sqrt(1 - _IN_COMMON) * draw.gauss(0, 1)
            completions.append(min(_log_normal(*_COMPLETION, deviation), max_length - prompt - 1))
        yield _pair(draw, prompt, *completions)


def _long(count: int, length: int) -> Iterator[Pair]:
    """Pairs whose prompts are half of each row."""
    draw = random.Random(0)
    for _ in range(count):
        yield _pair(draw, length // 2, length - length // 2 - 1, length - length // 2 - 1)


def _pair(draw: random.Random, prompt: int, chosen: int, rejected: int) -> Pair:
    """Completions have the end of the text besides."""
    words = _words()
    text = [" ".join(draw.choices(words, k=length)) for length in (prompt, chosen, rejected)]
    return {"prompt": text[0], "chosen": f" {text[1]}", "rejected": f" {text[2]}"}


def _log_normal(mean: float, spread: float, deviation: float) -> int:
    return max(1, round(exp(log(mean) - spread**2 / 2 + spread * deviation)))


def _words() -> list[str]:
    return [f"w{number}" for number in range(VOCABULARY - len(_SPECIAL))]
