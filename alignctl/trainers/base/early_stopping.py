"""Stops training once a held-out metric has not got better for a while."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class StopsEarly(EarlyStoppingCallback):
    """transformers' callback, which also counts on where a run is continued.

    transformers would take up what checkpoints hold of callbacks only with
    `restore_callback_states_from_checkpoint`, and then of all of them.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.early_stopping_patience_counter = evaluations_without_better(state)

    def exhausted(self, state: TrainerState) -> bool:
        """Whether training had ended early with the checkpoint that a state is from."""
        return evaluations_without_better(state) >= self.early_stopping_patience


def evaluations_without_better(state: TrainerState) -> int:
    """How many there have been, by a checkpoint's state; 0 for a training that begins."""
    kept = state.stateful_callbacks.get(StopsEarly.__name__, {})
    return kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
