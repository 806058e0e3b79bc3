"""What a trainer tells the outside while it works: metrics.jsonl, progress.json, and whether it was asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignctl.monitor.heartbeat import EVALUATING, SAVING, TRAINING, Heartbeat, RehearsalHeartbeat
from alignctl.monitor.stopping import StopSignal
from alignctl.run.files import append_json_lines, keep_steps, write_json
from alignctl.run.paths import StagePaths

_PROGRESS_EVERY_S = 0.25
_NUM_SAMPLES, _SHOWN = 2, 300  # samples in the progress, and characters of each
# Keys of the trainer's logs that are not metrics.
_NOT_METRICS = ("epoch", "total_flos")
# In the log that sums up a call of `train`; a run that was continued has several.
_SUMMARY = "train_runtime"


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer while it trains to metrics.jsonl, as {step, epoch, metric: value}.

    When training continues from a checkpoint, lines after its step are dropped first: they will be written again.
    """

    def __init__(self, paths: StagePaths, tell: Callable[[str], None]):
        """Takes whom to tell of lines that are damaged."""
        self._path, self._tell = paths.metrics, tell
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True
        first = state.is_world_process_zero
        if first and (damaged := keep_steps(self._path, lambda step: step <= state.global_step)):
            self._tell(damaged)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self._training and logs and _SUMMARY not in logs:
            row = {"step": state.global_step, "epoch": state.epoch} | {
                key: value for key, value in logs.items() if key not in _NOT_METRICS
            }
            append_json_lines(self._path, [row])


class ProgressFile(TrainerCallback):
    """Keeps progress.json current: step, steps in all, last metrics and samples, tokens per second, seconds left. Says
    of every process what it is doing (see heartbeat.py)."""

    def __init__(
        self,
        paths: StagePaths,
        key_metrics: tuple[str, ...],
        heartbeat: Heartbeat | RehearsalHeartbeat,
        is_first: bool = True,
    ):
        self._path, self._is_first = paths.progress, is_first
        self._heartbeat = heartbeat
        self._key_metrics = key_metrics
        self._metrics: dict[str, float] = {}
        self._tokens_per_s: float | None = None
        self._tokens_then: tuple[float, float] | None = None
        self._first_step = 0
        self._started = self._written = 0.0
        self._last: dict[str, Any] | None = None
        self._phase: dict[str, Any] = {"phase": ""}
        self._trains = False
        self._notices: list[str] = []
        self._samples: list[dict[str, Any]] = []

    def phase(self, name: str, total: int | None = None, unit: str = "rows") -> None:
        """Says what the stage is doing when it is not training, and how training ended if it has.

        Args:
            total: How many of a `unit` this process is going to count, where that is known.
        """
        self._phase = {"phase": name} | ({} if total is None else {"total": total, "unit": unit})
        self._heartbeat.beat(name)
        if self._is_first:
            self._write_phase()

    def _write_phase(self) -> None:
        self._put(self._phase | {"notices": self._notices, "trained": self._last})

    def _put(self, content: dict[str, Any]) -> None:
        write_json(self._path, content, make_folder=False)  # which may have been taken away or renamed

    def notice(self, text: str) -> None:
        """Tells people something about the stage that is not an error."""
        if text not in self._notices:
            self._notices.append(text)
            if self._is_first and not self._trains:  # else the next step says it
                self._write_phase()

    @property
    def notices(self) -> list[str]:
        """What people were told."""
        return list(self._notices)

    def count(self, what: str, more: int = 1) -> None:
        """Says that the process goes on with what it does; see `Heartbeat.count`."""
        self._heartbeat.count(what, more)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Takes what was drawn last: `prompt` and `completion`, text or messages, and `score`."""
        self._samples = [
            {"prompt": _text(row["prompt"])[-_SHOWN:], "completion": _text(row["completion"])[:_SHOWN]}
            | {"score": row["score"]}
            for row in rows[:_NUM_SAMPLES]
        ]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trains = True
        self._first_step, self._started = state.global_step, time.monotonic()
        self._heartbeat.beat(TRAINING, state.global_step)
        if state.is_world_process_zero:
            self._write(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._heartbeat.beat(TRAINING, state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trains:
            self._heartbeat.beat(EVALUATING, state.global_step)
        self.count("batches")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trains = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._heartbeat.beat(TRAINING, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._metrics = {key: float(logs[key]) for key in ("loss", *self._key_metrics) if key in logs}
        if "num_tokens" in logs:
            now = (time.monotonic(), float(logs["num_tokens"]))
            if self._tokens_then and now[0] > self._tokens_then[0]:
                self._tokens_per_s = (now[1] - self._tokens_then[1]) / (now[0] - self._tokens_then[0])
            self._tokens_then = now
        if "loss" in logs:
            self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._heartbeat.beat(SAVING if control.should_save else TRAINING, state.global_step)
        if not control.should_log:  # else the step is shown with what is logged of it, which follows
            self._show(state)

    def _show(self, state: TrainerState) -> None:
        """Writes the step if that is due, or is the last, or is there without what was logged of it just now."""
        written = self._last is not None and self._last["step"] == state.global_step
        due = time.monotonic() - self._written > _PROGRESS_EVERY_S
        if state.is_world_process_zero and (due or written or state.global_step >= state.max_steps):
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        self._written = time.monotonic()
        done = state.global_step - self._first_step
        left = state.max_steps - state.global_step
        self._last = {
            "phase": "training",
            "notices": self._notices,
            "step": state.global_step,
            "max_steps": state.max_steps,
            "metrics": self._metrics,
            "samples": self._samples,
            "tokens_per_s": self._tokens_per_s,
            "seconds_left": (self._written - self._started) / done * left if done else None,
        }
        self._put(self._last)


def _text(said: str | list[dict[str, str]]) -> str:
    """What a prompt ends with, or a completion says."""
    return said if isinstance(said, str) else said[-1]["content"]


class StopOnRequest(TrainerCallback):
    """Saves and stops at the end of the step in which the process, or any other of the run, was asked to stop.

    A trainer asks the processes once a step, with everything else it asks them."""

    def __init__(self, signal: StopSignal):
        self._signal = signal
        self.agreed = False
        """Whether any process of the run was asked to, as all of them know."""
        self.stopped = False
        """Whether training ended because of the request, with a checkpoint of its last step."""

    @property
    def requested(self) -> bool:
        """Whether this process was asked to."""
        return self._signal.requested

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signal.waits = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agreed and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signal.waits = False
        if self._signal.requested and not self.stopped:  # asked in the last step, which needs no stopping
            raise KeyboardInterrupt
