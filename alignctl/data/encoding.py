"""Token ids of many texts at once, the same ones as of each by itself. Torch-free: works with any tokenizer.

What texts begin with in common is encoded once. A text may be cut in two where its tokens never reach across: between
two words, where the tokenizer splits texts into words from left to right before anything else (arXiv:1508.07909 is done
within each). For which tokenizers that holds is read from what they say of themselves, and tried.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from alignctl.data.tokenizing import without_added_end

Ids = list[int]

_BETWEEN_WORDS = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)  # up to the last such place
_LEAST = 64  # characters in common that are worth a cut
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBAG]|(?<![\[\\])\^")


def encodes_batches(tokenizer: Any) -> bool:
    """Whether it is one of the library `tokenizers`: of others, one text at a time is all that is known to be right."""
    return bool(getattr(tokenizer, "is_fast", False)) and hasattr(tokenizer, "backend_tokenizer")


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that token ids and written conversations depend on. What the last call left in it is no part."""
    kind, backend = type(tokenizer), tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    state = backend.to_str()
    said = [f"{kind.__module__}.{kind.__qualname__}", state, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


class Encoder:
    """Encodes texts in groups which begin alike."""

    def __init__(self, tokenizer: Any, tried: Sequence[Sequence[str]]):
        """`tried` are some groups as they will come: cutting has to make no difference for them."""
        self._tokenizer = tokenizer
        self._around = _specials(tokenizer)
        self._cuts = self._around is not None and _may_be_cut(tokenizer)
        for special in (True, False) if self._cuts else ():
            self._cuts = self._cuts and self._cut(tried, special) == self._plain(tried, special)

    def __call__(self, groups: Sequence[Sequence[str]], special: bool) -> list[list[Ids]]:
        """Token ids of each text of each group.

        Args:
            special: Whether the tokens that the tokenizer puts around a text are wanted; templates write their own.
        """
        return self._cut(groups, special) if self._cuts else self._plain(groups, special)

    def _plain(self, groups: Sequence[Sequence[str]], special: bool) -> list[list[Ids]]:
        found = iter(self._ids([text for texts in groups for text in texts], special))
        if not special:
            return [[next(found) for _ in texts] for texts in groups]
        return [[without_added_end(self._tokenizer, text, next(found)) for text in texts] for texts in groups]

    def _cut(self, groups: Sequence[Sequence[str]], special: bool) -> list[list[Ids]]:
        before, after = self._around if special else ([], [])
        if after == [self._tokenizer.eos_token_id]:
            after = []
        cuts = [_cut_of(texts) for texts in groups]
        parts = [
            part
            for texts, cut in zip(groups, cuts, strict=True)
            for part in (texts[0][:cut], *(t[cut:] for t in texts))
        ]
        found = iter(self._ids(parts, special=False))
        encoded = []
        for texts in groups:
            head = before + next(found)
            encoded.append([head + next(found) + after for _ in texts])
        return encoded

    def _ids(self, texts: list[str], special: bool) -> list[Ids]:
        if not texts:
            return []
        unwanted = {"return_attention_mask": False, "return_token_type_ids": False}
        return self._tokenizer(texts, add_special_tokens=special, **unwanted)["input_ids"]


def _cut_of(texts: Sequence[str]) -> int:
    """Where to cut texts: the last place between two words of what they begin with in common; 0 for nowhere."""
    if len(texts) < 2:
        return 0
    common = texts[0]
    for text in texts[1:]:
        common = _common(common, text)
    found = _BETWEEN_WORDS.match(common)
    return found.end() if found and found.end() >= _LEAST else 0


def _common(text: str, other: str) -> str:
    """What two texts begin with."""
    least, most = 0, min(len(text), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if text[least:middle] == other[least:middle] else (least, middle - 1)
    return text[:least]


def _specials(tokenizer: Any) -> tuple[Ids, Ids] | None:
    """What a tokenizer puts before and after a text; None where it is not that simple."""
    whole, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    return None


def _may_be_cut(tokenizer: Any) -> bool:
    """Whether a tokenizer splits texts between words, from left to right, and nothing of it reaches across a space."""
    state = _state(tokenizer)
    splitter = state["pre_tokenizer"] or {"type": None}
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    tokens = tokenizer.added_tokens_decoder.values()
    if (
        state["model"]["type"] != "BPE"
        or state["model"].get("dropout")
        or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC"
        or not all(map(_splits_forwards, steps))
        or any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in tokens)
    ):
        return False
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("one two three")
    return [start for _, (start, _) in words] == [0, 3, 7]


def _splits_forwards(step: dict[str, Any]) -> bool:
    """Whether where a step of splitting begins makes no difference for what it does later on."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Split":
        pattern = step["pattern"].get("Regex")
        return step["behavior"] == "Isolated" and pattern is not None and not _LOOKS_BACK.search(pattern)
    return step["type"] == "Digits"


def _state(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())
