"""Which rows are held out: whole prompts, so that none is on both sides, in however many sources it is. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from alignctl.data.scanning import plain_prompts, prompt_keys


def rows_wanted(eval_rows: float, count: int) -> int:
    """Rows to hold out of some: so many, but at most a fifth, or that share of them."""
    return round(eval_rows * count) if eval_rows < 1 else min(int(eval_rows), count // 5)


def held_out(sources: Sequence[Dataset], wanted: Sequence[int], seed: int) -> list[np.ndarray]:
    """The rows of each source that are held out, the same ones for the same seed, whatever the order of the rows.

    Args:
        wanted: Of each source at most so many; more only where another source has its prompts, too.

    Returns:
        Of each source, bool `[rows]`.
    """
    if not any(wanted):
        return [np.zeros(len(rows), bool) for rows in sources]
    prompts = [list(plain_prompts(rows)) for rows in sources]
    held: set[bytes] = set()
    for rows, own, most in zip(sources, prompts, wanted, strict=True):
        counts, order = Counter(own), {}
        for prompt, key in zip(own, prompt_keys(rows, seed), strict=True):
            order[prompt] = min(key, order.get(prompt, key))
        taken = sum(counts[prompt] for prompt in held)
        for prompt in sorted(order.keys() - held, key=order.__getitem__):
            if taken + counts[prompt] <= most:
                held.add(prompt)
                taken += counts[prompt]
    return [np.fromiter((prompt in held for prompt in own), bool, len(own)) for own in prompts]


def shared_prompts(trained_on: Sequence[Dataset], held: Dataset) -> int:
    """Held-out rows whose prompt training rows have, too."""
    counts = Counter(plain_prompts(held))
    shared = {prompt for rows in trained_on for prompt in plain_prompts(rows) if prompt in counts}
    return sum(counts[prompt] for prompt in shared)
