"""Which rows are held out: whole prompts and conversations, so that none is on both sides, in however many sources.
Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop

import numpy as np
from datasets import Dataset

from alignctl.data.scanning import plain_prompts, prompt_keys


def rows_wanted(eval_rows: float, count: int) -> int:
    """Rows to hold out of some: so many, but at most a fifth, or that share of them."""
    return round(eval_rows * count) if eval_rows < 1 else min(int(eval_rows), count // 5)


def held_out(
    sources: Sequence[Dataset], numbers: Sequence[Sequence[int]], wanted: Sequence[int], seed: int
) -> list[np.ndarray]:
    """The rows of each source that are held out, the same ones for the same seed, whatever the order of the rows.

    Args:
        numbers: Of each source, which row of a file each of its rows was made of: turns of one conversation stay
            together, and so do two conversations that have a prompt in common.
        wanted: Of each source at most so many; more only where another source has its prompts, too.

    Returns:
        Of each source, bool `[rows]`.
    """
    if not any(wanted):
        return [np.zeros(len(rows), bool) for rows in sources]
    prompts = _together([list(plain_prompts(rows)) for rows in sources], numbers)
    held: set[bytes] = set()
    for rows, own, most in zip(sources, prompts, wanted, strict=True):
        counts, order = Counter(own), {}
        for prompt, key in zip(own, prompt_keys(rows, seed), strict=True):
            order[prompt] = min(key, order.get(prompt, key))
        taken = sum(counts[prompt] for prompt in held)
        first = [(key, prompt) for prompt, key in order.items() if prompt not in held]
        heapify(first)
        while first and taken < most:
            _, prompt = heappop(first)
            if taken + counts[prompt] <= most:
                held.add(prompt)
                taken += counts[prompt]
    return [np.fromiter((prompt in held for prompt in own), bool, len(own)) for own in prompts]


def _together(prompts: Sequence[list[bytes]], numbers: Sequence[Sequence[int]]) -> list[list[bytes]]:
    """Prompts of each source, and in place of those that were made of one row of a file the least of all that hang
    together."""
    less: dict[bytes, bytes] = {}

    def least(prompt: bytes) -> bytes:
        while prompt in less:
            less[prompt] = prompt = less.get(less[prompt], less[prompt])
        return prompt

    for own, rows in zip(prompts, numbers, strict=True):
        rows = np.asarray(rows)
        for place in np.flatnonzero(rows[1:] == rows[:-1]).tolist():
            if (a := least(own[place])) != (b := least(own[place + 1])):
                less[max(a, b)] = min(a, b)
    return [[least(prompt) for prompt in own] for own in prompts] if less else list(prompts)


def shared_prompts(trained_on: Sequence[Dataset], held: Dataset) -> int:
    """Held-out rows whose prompt training rows have, too."""
    counts = Counter(plain_prompts(held))
    shared = {prompt for rows in trained_on for prompt in plain_prompts(rows) if prompt in counts}
    return sum(counts[prompt] for prompt in shared)
