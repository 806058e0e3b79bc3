"""What an on-policy trainer logs of its rollouts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignctl.rollout.episodes import Episodes
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score, of_scored, totals
from alignctl.run.files import append_json_lines, keep_steps
from alignctl.trainers.on_policy.experience import Experience

_OF = ("sum", "count", "squares")


class RolloutLog:
    """Numbers of the rollouts since the last log, and some completions of the newest one.

    What is a mean over completions or tokens is kept as sums until the end of the step, when the processes put theirs
    together.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}
        self._deviations: dict[str, str] = {}
        self._unbiased: set[str] = set()
        self._least: dict[str, float] = {}
        self._signs: dict[str, float] = {}
        self._explained: dict[str, tuple[str, str]] = {}
        self.samples: list[dict[str, Any]] = []
        self.counts = True
        """Whether this process has a part in the rollout; else its sums are 0."""
        self._file_is_clean = False

    def add(self, name: str, value: float) -> None:
        """Adds what this process knows."""
        self._values[name].append(value)

    def add_mean(
        self,
        name: str,
        values: Tensor | list[float] | list[bool],
        deviation: str | None = None,
        unbiased: bool = False,
    ) -> None:
        """Adds the mean over all processes, and the standard deviation under a name of its own."""
        given = (values.detach() if isinstance(values, Tensor) else torch.tensor(values)).double().flatten()
        if deviation is not None:
            self._deviations[name] = deviation
        if unbiased:
            self._unbiased.add(name)
        self.add_sums(name, given.sum(), len(given), (given**2).sum())

    def add_sums(self, name: str, total: Tensor, count: Tensor | float, squares: Tensor | float = 0.0) -> None:
        """Adds the mean over all processes of what adds up to these."""
        sums = torch.stack([torch.as_tensor(one, device=total.device).double() for one in (total, count, squares)])
        self._sums[name] = sums if self.counts else torch.zeros_like(sums)

    def add_of(self, of: Literal["mean", "min", "max"], name: str, values: Tensor) -> None:
        """Adds the mean, the least or the most over all processes; 0 where there are no values."""
        if of == "mean":
            self.add_mean(name, values)
            return
        sign = self._signs[name] = -1.0 if of == "max" else 1.0
        there = self.counts and values.numel()
        self._least[name] = float((sign * values).min()) if there else math.inf

    def add_explained(self, name: str, values: Tensor, truth: Tensor) -> None:
        """Adds the share of the variance of the truth, over all processes, that values explain: 1 is perfect, 0 no
        better than the mean."""
        self._explained[name] = left, whole = f"{name} left", f"{name} whole"
        self.add_mean(left, truth - values)
        self.add_mean(whole, truth)

    def add_rollout(
        self, episodes: Episodes, experience: Experience, rewards: dict[str, list[Score]], scores: list[Score]
    ) -> None:
        """Adds what every method's rollouts have: scores, distance from the reference, lengths, advantages.

        Args:
            rewards: Scores by each source, by its name.
            scores: What was made of them.
        """
        for name, values in rewards.items():
            self.add_mean(f"rewards/{name}", of_scored(values), f"rewards/{name}_std")
        self.add_mean("score", of_scored(scores), "score_std")
        self.add_kl(experience)
        self.add_mean("completion_length", [float(len(ids)) for ids in episodes.completion_ids])
        self.add_mean("eos_share", episodes.ended)
        self.add_mean("advantages/mean", experience.advantages[experience.mask.bool()], "advantages/std")

    def add_kl(self, experience: Experience) -> None:
        """Adds the distance from the reference, where there is one, in nats per completion."""
        if experience.ref_logps is not None:
            for estimator in ("k1", "k2", "k3"):
                per_token = kl_estimates(experience.logps, experience.ref_logps, estimator) * experience.mask
                self.add_mean(f"kl/{estimator}", per_token.sum(1))

    def numbers(self) -> dict[str, float]:
        """What the processes tell each other at the end of a step, under the same names in all of them."""
        names, sums = list(self._sums), torch.stack([one.cpu() for one in self._sums.values()]).tolist()
        found = {
            f"{name} {of}": value
            for name, row in zip(names, sums, strict=True)
            for of, value in zip(_OF, row, strict=True)
        }
        return found | {f"{name} least": value for name, value in self._least.items()}

    def take(self, everyone: Mapping[str, Tensor]) -> None:
        """Takes the numbers of all processes."""
        variances, unsaid = {}, {part for parts in self._explained.values() for part in parts}
        for name in self._sums:
            total, count, squares = (float(everyone[f"{name} {of}"].sum()) for of in _OF)
            mean = total / max(count, 1.0)
            variances[name] = max(squares / max(count, 1.0) - mean**2, 0.0)
            if name not in unsaid:
                self.add(name, mean)
            if name in self._deviations:
                free = count / max(count - 1, 1.0) if name in self._unbiased else 1.0
                self.add(self._deviations[name], math.sqrt(variances[name] * free))
        for name, (left, whole) in self._explained.items():
            self.add(name, 1 - variances[left] / max(variances[whole], 1e-8))
        for name in self._least:
            least = float(everyone[f"{name} least"].min())
            self.add(name, 0.0 if math.isinf(least) else self._signs[name] * least)
        self._sums.clear()
        self._least.clear()

    def last(self, name: str) -> float:
        return self._values[name][-1]

    def means(self) -> dict[str, float]:
        """Of the values since the last call."""
        found = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return found

    def sample(self, episodes: Episodes, rewards: dict[str, list[Score]], scores: list[Score], count: int) -> None:
        """Keeps the first completions of a rollout."""
        by_source = {name: totals(values) for name, values in rewards.items()}
        whole = totals(scores)
        self.samples = [
            {
                "prompt": episodes.prompts[i],
                "completion": episodes.completions[i],
                "score": whole[i] if scores[i] else None,
                "rewards": {name: values[i] if rewards[name][i] else None for name, values in by_source.items()},
            }
            for i in range(min(count, len(whole)))
        ]

    def write_samples(self, path: Path, step: int, tell: Callable[[str], None]) -> None:
        """Adds the samples to their file. Before the first ones, what training that is continued wrote after its
        checkpoint is dropped: it is written again.

        Args:
            tell: Whom to tell of lines that are damaged.
        """
        if not self._file_is_clean:
            if damaged := keep_steps(path, lambda before: before < step):
                tell(damaged)
            self._file_is_clean = True
        append_json_lines(path, [{"step": step} | row for row in self.samples])
