"""What an on-policy trainer logs of its rollouts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignctl.rollout.episodes import Episodes
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score, totals
from alignctl.run.files import append_json_lines, read_json_lines, write_json_lines
from alignctl.trainers.on_policy.experience import Experience, moments


class RolloutLog:
    """Numbers of the rollouts since the last log, and some completions of the newest one."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._values: dict[str, list[float]] = defaultdict(list)
        self.samples: list[dict[str, Any]] = []
        self._file_is_clean = False

    def add(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def add_mean(self, name: str, values: Tensor | list[float] | list[bool]) -> None:
        """Adds the mean over all processes."""
        self.add(name, float(self._everywhere(values).mean()))

    def add_scores(self, name: str, deviation: str, scores: list[Score]) -> None:
        """Adds mean and standard deviation of the completions' scores over all processes."""
        everywhere = self._everywhere(totals(scores))
        self.add(name, float(everywhere.mean()))
        self.add(deviation, float(everywhere.std(unbiased=False)))

    def add_rollout(
        self, episodes: Episodes, experience: Experience, rewards: dict[str, list[Score]], scores: list[Score]
    ) -> None:
        """Adds what every method's rollouts have: scores, distance from the reference, lengths, advantages.

        Args:
            rewards: Scores by each source, by its name.
            scores: What was made of them.
        """
        for name, values in rewards.items():
            self.add_scores(f"rewards/{name}", f"rewards/{name}_std", values)
        self.add_scores("score", "score_std", scores)
        if experience.ref_logps is not None:
            for estimator in ("k1", "k2", "k3"):
                per_token = kl_estimates(experience.logps, experience.ref_logps, estimator) * experience.mask
                self.add_mean(f"kl/{estimator}", per_token.sum(1))
        self.add_mean("completion_length", [float(len(ids)) for ids in episodes.completion_ids])
        self.add_mean("eos_share", episodes.ended)
        mean, var = moments(experience.advantages, experience.mask, self.add_up)
        self.add("advantages/mean", float(mean))
        self.add("advantages/std", float(var.sqrt()))

    def add_up(self, value: Tensor) -> Tensor:
        """Over all processes."""
        return self._accelerator.reduce(value, "sum")

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
                "score": whole[i],
                "rewards": {name: values[i] for name, values in by_source.items()},
            }
            for i in range(min(count, len(whole)))
        ]

    def write_samples(self, path: Path, step: int) -> None:
        """Adds the samples to their file. Before the first ones, what training that is continued wrote after its
        checkpoint is dropped: it is written again."""
        if not self._file_is_clean:
            write_json_lines(path, [row for row in read_json_lines(path) if row["step"] < step])
            self._file_is_clean = True
        append_json_lines(path, [{"step": step} | row for row in self.samples])

    def _everywhere(self, values: Tensor | list[float] | list[bool]) -> Tensor:
        given = values.detach() if isinstance(values, Tensor) else torch.tensor(values)
        return self._accelerator.gather(given.float().to(self._accelerator.device))
