"""What passes and batches came to, of all processes: means by what they are means over, and ends.

TRL's trainers ask the other processes for each metric of each batch. Here a process keeps what it found to itself, and
all of it is put together at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor

ROWS = "rows"
"""Name of the count that a mean is over, unless a trainer says otherwise."""
_LEAST, _MOST = {"min_reward"}, {"max_reward"}
# The second is made of others, and of single completions not every pass has it.
_LEFT_OUT = {"num_tokens", "rewards/margins"}
_NOBODYS = {"least": float("inf"), "most": -float("inf")}


class Tally:
    """Takes what TRL's trainers find of one pass, or batch, after another."""

    def __init__(self, means: Mapping[str, str]):
        """`means` are metrics that are means over something else than rows, with the name of its count. They are there
        in every process, whether it found them or not."""
        self._means = means
        self._numbers: dict[str, float] = defaultdict(float, {f"sum {name}": 0.0 for name in means})
        self._numbers |= {f"of {name}": 0.0 for name in means} | {"tokens": 0.0}

    def add(self, metrics: Mapping[str, list[float]], counts: Mapping[str, int]) -> None:
        """Adds the metrics of a pass; without rows it was computed for nothing, and its names alone count."""
        numbers, real = self._numbers, counts[ROWS] > 0
        for name, (*_, value) in ((name, values) for name, values in metrics.items() if name not in _LEFT_OUT):
            if name in _LEAST | _MOST:
                end = "least" if name in _LEAST else "most"
                known = numbers.setdefault(f"{end} {name}", _NOBODYS[end])
                numbers[f"{end} {name}"] = (min if name in _LEAST else max)(known, value) if real else known
                continue
            count = counts[self._means.get(name, ROWS)]
            numbers[f"sum {name}"] += value * count if count else 0.0
            numbers[f"of {name}"] += count
        numbers["tokens"] += metrics["num_tokens"][-1] if real else 0.0

    def numbers(self) -> dict[str, float]:
        """Under the same names in every process that computed anything."""
        return dict(self._numbers)


def tokens_of(everyone: Mapping[str, Tensor]) -> int:
    """Tokens that all processes were trained on."""
    return int(everyone["tokens"].sum())


def metrics_of(everyone: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics, of the numbers of all processes."""
    found: dict[str, float] = {}
    for key, values in everyone.items():
        kind, _, name = key.partition(" ")
        if kind == "sum" and (count := float(everyone[f"of {name}"].sum())):
            found[name] = float(values.sum()) / count
        elif kind in _NOBODYS:
            found[name] = float(values.min() if kind == "least" else values.max())
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


@contextmanager
def alone(accelerator: Accelerator) -> Iterator[None]:
    """As if there were no other processes to gather anything from."""
    if "gather" in vars(accelerator):
        yield
        return
    accelerator.gather = accelerator.gather_for_metrics = lambda values, *args, **kwargs: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


@contextmanager
def metrics_apart(trainer: Any, mode: str) -> Iterator[dict[str, list[float]]]:
    """What one of TRL's trainers finds meanwhile, of this process alone.

    Args:
        mode: `train` or `eval`.
    """
    tokens, metrics = trainer._total_train_tokens, trainer._metrics
    kept, metrics[mode] = metrics[mode], defaultdict(list)
    try:
        with alone(trainer.accelerator):
            yield metrics[mode]
    finally:
        metrics[mode]["num_tokens"] = [trainer._total_train_tokens - tokens]
        metrics[mode], trainer._total_train_tokens = kept, tokens
