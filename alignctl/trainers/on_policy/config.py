"""Settings that every method which learns from its own completions has."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from alignctl.rollout.settings import RewardSettings, RolloutSettings
from alignctl.trainers.base.on_engine import EngineConfig


@dataclass
class OnPolicyConfig(RolloutSettings, RewardSettings, EngineConfig, TrainingArguments):
    """Settings beside those of transformers; a step is a rollout of `per_device_train_batch_size` completions and all
    updates made with it."""

    num_mini_batches: int = 1
    """Optimizer steps per time that a rollout is gone through."""
    disable_dropout: bool = True
    """Switches dropout off, so that the first ratio of every rollout is 1."""
    num_sample_completions: int = 4
    """Completions of each log that are kept with their reward in samples_while_training.jsonl."""
    use_vllm: bool | None = None
    """TRL's way to say `generation=vllm`; false is `generation=transformers` where nothing else is said."""
    remove_unused_columns: bool = False
    """Nothing is to be removed: prompts go to the trainer as the rows have them."""

    def __post_init__(self) -> None:
        if self.use_vllm is not None and self.generation == "auto":
            self.generation = "vllm" if self.use_vllm else "transformers"
        super().__post_init__()
