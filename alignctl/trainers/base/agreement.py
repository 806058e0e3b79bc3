"""At the end of an optimizer step all processes learn at once what each found of it, whether one was asked to stop, and
whether one is still writing a checkpoint.

transformers and TRL ask for each number by itself: dozens of collectives a step, each with a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from alignctl.trainers.base.everywhere import from_all


class StopRequest(Protocol):
    """Whether training is to stop after a step."""

    requested: bool
    """Of this process."""
    agreed: bool
    """Of any process, once a step is over; set here."""


class EndsStepsTogether:
    """Mixin before StopsWhenNotFinite, CompleteCheckpoints and a transformers Trainer that has `step_numbers()`: what
    this process found of a step, under the same names in all of them; and `take_step_numbers(everyone)`, which takes
    those of all processes, `[processes]` each."""

    stop: StopRequest | None = None
    own_loss: float
    """Of this process, of the step that was taken last."""
    writing: bool
    """Whether this process is still writing a checkpoint."""
    all_have_written: Callable[[], None]
    """Is called when no process is."""
    _flos = 0.0
    """Floating point operations of all processes that are not in the trainer's state yet."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_Ends(self))

    def end_step(self) -> None:
        """Asks the others; all processes call it together."""
        flags = {
            "stop": float(self.stop is not None and self.stop.requested),
            "loss": self.own_loss,
            "flos": float(self.current_flos),
            "writing": float(self.writing),
        }
        numbers = self.step_numbers()
        everyone = from_all(self.accelerator, {f"step {name}": value for name, value in numbers.items()} | flags)
        if self.stop is not None:
            self.stop.agreed = bool(everyone["stop"].any())
        if not everyone["writing"].any():
            self.all_have_written()
        self.take_step_numbers({name: everyone[f"step {name}"] for name in numbers})
        self._flos, self.current_flos = self._flos + float(everyone["flos"].sum()), 0
        if self.accelerator.num_processes > 1:
            self._tr_loss += float(everyone["loss"].mean()) - self.own_loss

    def store_flos(self) -> None:
        self.state.total_flos += self._flos
        self._flos = 0.0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with _loss_of_all():
            super()._maybe_log_save_evaluate(*args, **kwargs)


class _Ends(TrainerCallback):
    """Is told by transformers when the optimizer has taken its step, before others are that the step is over."""

    def __init__(self, trainer: EndsStepsTogether):
        self._trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.end_step()


@contextmanager
def _loss_of_all() -> Iterator[None]:
    """transformers (5.23) logs the loss that it has, which is that of all processes already."""
    usual = transformers_trainer.nested_gather
    transformers_trainer.nested_gather = lambda loss, *args, **kwargs: loss
    try:
        yield
    finally:
        transformers_trainer.nested_gather = usual
