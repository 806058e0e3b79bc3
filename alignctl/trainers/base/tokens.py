"""Lets a run that is continued go on counting the tokens it was trained on."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CountsTokens(TrainerCallback):
    """Keeps TRL's count, which it logs as `num_tokens`, in the state that checkpoints hold."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._counts(args) and state.global_step:
            self._trainer._total_train_tokens = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._counts(args):
            state.num_input_tokens_seen = int(self._trainer._total_train_tokens)

    def _counts(self, args: TrainingArguments) -> bool:
        """Not where transformers counts its own tokens there."""
        return hasattr(self._trainer, "_total_train_tokens") and args.include_num_input_tokens_seen == "no"
