"""What a process is to do of a stage, in one piece: handed to everything that builds, measures, trains and saves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase, TrainingArguments

from alignctl.config.stages import StageConfig
from alignctl.data.rows import Rows
from alignctl.methods.registry import Method, Role, methods
from alignctl.monitor.callbacks import ProgressFile, StopOnRequest
from alignctl.monitor.trackers import Trackers
from alignctl.run.paths import StagePaths

Weights = Mapping[Role, str | None]
"""Folder or Hub id of each role's weights; None for random ones."""


@dataclass(frozen=True)
class Job:
    """A stage with its rows, its tokenizer, and where it writes."""

    stage: StageConfig
    weights: Weights
    paths: StagePaths
    progress: ProgressFile
    stop: StopOnRequest
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    """As the tokenizer can write them."""
    held_rows: Rows | None
    new_tokens: Sequence[int]
    """Ids that the tokenizer has and the one beside the weights of the trained model has not."""
    args: TrainingArguments
    """Of the trainer. Those made last are the ones transformers knows of: under ZeRO-3 they say that weights are to be
    divided as they are read."""
    trackers: Trackers = field(default_factory=Trackers)
    """None of them, unless it is the first process that really trains."""

    @property
    def method(self) -> Method:
        return methods()[self.stage.method]

    @property
    def start(self) -> str | None:
        """Where the weights of the trained model come from; None for random ones."""
        return self.weights[self.method.trained]

    def new_to(self, source: str | None) -> Sequence[int]:
        """Of these, what weights have to learn: those that others were trained with say themselves."""
        return self.new_tokens if source == self.start else ()

    @property
    def starts_as_reference(self) -> bool:
        """Whether the trained model is its own reference before it is trained."""
        return self.weights.get("reference") in (self.start, None)


def rank() -> int:
    """Which of the run's processes this is; known before they have found each other."""
    return int(os.environ.get("RANK", 0))
