"""Has a trainer log often enough that a short run has a curve, too."""

from __future__ import annotations

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_POINTS = 20


class LogsEnough(TrainerCallback):
    """Logs the first and the last step, those that are evaluated after, since training may end early with one, and so
    many between them that there are about 20, where `logging_steps` would make fewer. With `logging_strategy=no`
    nothing is logged, and with `epoch` nothing more between.

    To be called after transformers' own callback, which decides by `logging_steps` alone.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        if args.logging_strategy == IntervalStrategy.NO:
            return control
        ends = state.global_step in (1, state.max_steps) or control.should_evaluate
        every = max(state.max_steps // _POINTS, 1)
        between = args.logging_strategy == IntervalStrategy.STEPS and every < state.logging_steps
        if ends or (between and state.global_step % every == 0):
            control.should_log = True
        return control
