"""Settings that every method which learns from its own completions has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from alignctl.rollout.settings import RolloutSettings
from alignctl.trainers.base.on_engine import EngineConfig


@dataclass
class OnPolicyConfig(RolloutSettings, EngineConfig, TrainingArguments):
    """Settings beside those of transformers; a step is a rollout of `per_device_train_batch_size` completions and all
    updates made with it."""

    reward_funcs: list[str] = field(default_factory=list)
    """Functions that score completions, `module:function`, beside the reward model: called with `prompts` and
    `completions` (text or messages, as the rows have them), they return a number for each."""
    reward_weights: list[float] | None = None
    """Weights of the sources of the reward: the reward model first, then the functions; None weighs all 1."""
    normalize_rewards: Literal["none", "statistics", "running"] = "none"
    """Scores less their mean, over their deviation: those of the reward model's `reward_statistics.json`, or of all
    scores so far."""
    reward_clip: float | None = None
    """Scores are kept within plus and minus this, after they are normalised (arXiv:2005.12729, Sec. 3)."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a completion that does not end by itself, arXiv:2403.17031, Sec. 3."""
    num_mini_batches: int = 1
    """Optimizer steps per time that a rollout is gone through."""
    disable_dropout: bool = True
    """Switches dropout off, so that the first ratio of every rollout is 1."""
    num_sample_completions: int = 4
    """Completions of each log that are kept with their reward in samples_while_training.jsonl."""
    remove_unused_columns: bool = False
    """Nothing is to be removed: prompts go to the trainer as the rows have them."""
