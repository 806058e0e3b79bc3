r"""Reward functions that users name in `reward_funcs`: exact_match, numeric, boxed_math, format, length_penalty,
repetition. Torch-free; their settings are told in config/rewards.py.

A completion whose row says nothing that can be compared has no score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from alignctl.data.messages import is_messages

# Of `5-3` the last is 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def exact_match(completions: Sequence[Any], answer: Sequence[Any], after: str | None = None) -> list[float | None]:
    """Whether completions are the answers."""
    return [
        None if right is None else float(_behind(_text(said), after) == _behind(str(right), after))
        for said, right in zip(completions, answer, strict=True)
    ]


def numeric(completions: Sequence[Any], answer: Sequence[Any], tolerance: float = 1e-6) -> list[float | None]:
    """Whether the last numbers of completions are those of the answers."""
    found = []
    for said, right in zip(completions, answer, strict=True):
        wanted, given = last_number(str(right)), last_number(_text(said))
        if wanted is None or given is None:
            found.append(None if wanted is None else 0.0)
        else:
            found.append(float(given == wanted or abs(given - wanted) <= tolerance * abs(wanted)))
    return found


def last_number(text: str) -> float | None:
    """The last number of a text, `1,234.5` or `-2e3`; None where it has none."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def boxed_math(completions: Sequence[Any], answer: Sequence[Any]) -> list[float | None]:
    r"""Whether the formulae in the last `\boxed{}` of completions are equal to the answers."""
    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    found: list[float | None] = []
    for said, right in zip(completions, answer, strict=True):
        if right is None:
            found.append(None)
            continue
        wanted = parse(right if "\\boxed" in str(right) else f"\\boxed{{{right}}}", boxed)
        formula = _last_boxed(_text(said))
        given = parse(formula, boxed) if formula else []
        found.append(float(verify(wanted, given)) if wanted else None)
    return found


def format(completions: Sequence[Any], pattern: str) -> list[float]:
    """Whether completions are of a form."""
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(_text(said)) is not None) for said in completions]


def length_penalty(completion_ids: Sequence[Sequence[int]], longest: int, buffer: int) -> list[float]:
    """0 up to `longest - buffer` tokens, from there to -1 at `longest` (arXiv:2503.14476, Eq. 13)."""
    return [0.0 - min(max(len(ids) - (longest - buffer), 0) / buffer, 1.0) for ids in completion_ids]


def repetition(completions: Sequence[Any], size: int = 3) -> list[float]:
    """Minus the share of the groups of `size` words that were there before; case does not matter."""
    found = []
    for said in completions:
        words = _text(said).lower().split()
        groups = list(zip(*(words[first:] for first in range(size)), strict=False))
        found.append(len(set(groups)) / len(groups) - 1 if groups else 0.0)
    return found


def _text(completion: Any) -> str:
    """A completion as text."""
    return completion[-1]["content"] if is_messages(completion) else completion


def _behind(text: str, mark: str | None) -> str:
    """What follows the last mark, or all of it."""
    return (text.rpartition(mark)[2] if mark else text).strip()


def _last_boxed(text: str) -> str | None:
    r"""The last `\boxed{...}` of a text with what its braces hold; None where there is none that is closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[start : place + 1]
    return None
