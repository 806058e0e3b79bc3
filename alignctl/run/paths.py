"""File names of a run directory. The only place that knows them, and the cache folder. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StagePaths:
    """Files of one stage."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished model: complete as soon as it exists."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The adapter alone, where one was trained."""
        return self.root / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what the trainer logged."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """What the stage is doing now, for whoever looks."""
        return self.root / "progress.json"

    @property
    def data(self) -> Path:
        """Rows read, kept and skipped."""
        return self.root / "data.json"

    @property
    def samples(self) -> Path:
        """Sampled completions before and after, one prompt a line."""
        return self.root / "samples.jsonl"

    @property
    def samples_while_training(self) -> Path:
        """Completions that PPO drew and how they scored, one a line."""
        return self.root / "samples_while_training.jsonl"

    @property
    def evaluation_before(self) -> Path:
        """What was measured before training, kept for a run that is continued."""
        return self.root / "evaluation_before.json"

    @property
    def result(self) -> Path:
        """What was measured; written last, so a stage with a result is done."""
        return self.root / "result.json"

    @property
    def error(self) -> Path:
        """Why the last attempt ended, for the process that started it."""
        return self.root / "error.json"

    def logs(self, attempt: int) -> Path:
        return self.root / "logs" / f"attempt_{attempt}"

    def new_attempt(self) -> int:
        """Number of the next attempt, counted from 1."""
        attempt = 1
        while self.logs(attempt).exists():
            attempt += 1
        return attempt


@dataclass(frozen=True)
class RunPaths:
    """Files of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def stage(self, name: str) -> StagePaths:
        return StagePaths(self.root / name)


def cache_dir() -> Path:
    """What runs share and may be removed at any time: ALIGNCTL_CACHE, else alignctl/ in the user's cache folder."""
    given = os.environ.get("ALIGNCTL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given).expanduser() if given else home / "alignctl"
