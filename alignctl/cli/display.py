"""Shows a run on standard error: one live line at a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alignctl.plan.plan import StagePlan

_COUNTED_EVERY_S = 30  # plain lines about how far a phase is


class Display:
    """Watches a run. Use as a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, every: int, quiet: bool = False):
        """Takes the optimizer steps between two plain lines, and whether it is to say nothing."""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        terminal = self._console.is_terminal
        self._live = Live(console=self._console, transient=True, refresh_per_second=8) if terminal else None
        self._every = every
        self._phase: str | None = None
        self._step_said = 0
        self._notices_said = 0
        self._counted_s = 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def started(self, stage: StagePlan, step: int | None) -> None:
        verb = f"continues after step {step}" if step else "starts"
        self._phase, self._step_said, self._notices_said = None, -1, 0
        self.say(f"{stage.config.name}: {verb} ({stage.config.method}, from {stage.start})")

    def finished(self, stage: StagePlan, seconds: float) -> None:
        if self._live:
            self._live.update("", refresh=True)
        self.say(f"{stage.config.name}: done in {duration(seconds)}")

    def progress(self, stage: StagePlan, progress: dict[str, Any]) -> None:
        name = stage.config.name
        notices = progress.get("notices", [])
        for notice in notices[self._notices_said :]:
            self.say(f"{name}: {notice}")
        self._notices_said = len(notices)
        if self._live:
            samples = [_sample_line(sample, self._console.width) for sample in progress.get("samples", ())]
            self._live.update(Group(_live_row(name, progress), *samples))
            return
        training = progress if "step" in progress else progress.get("trained")
        if training:
            self._say_step(name, training)
        if "step" in progress:
            return
        counted = _counted(progress)
        if progress["phase"] != self._phase:
            self._phase, self._counted_s = progress["phase"], time.monotonic()
            self.say(f"{name}: {self._phase}")
        elif counted and time.monotonic() > self._counted_s + _COUNTED_EVERY_S:
            self._counted_s = time.monotonic()
            self.say(f"{name}: {self._phase}: {counted}")

    def _say_step(self, name: str, training: dict[str, Any]) -> None:
        """A plain line at the start, every so many steps, and at the last."""
        step, last = training["step"], training["max_steps"]
        due = self._step_said < 0 or step // self._every > self._step_said // self._every or step == last
        if due and step != self._step_said:
            self._step_said = step
            self.say(f"{name}: step {step}/{last}{_facts(training)}")


def _live_row(name: str, progress: dict[str, Any]) -> Table:
    row = Table.grid(padding=(0, 1))
    if "step" not in progress:
        row.add_row(Text(name, style="bold"), f"{progress['phase']} ... {_counted(progress)}")
        return row
    step, steps = progress["step"], progress["max_steps"]
    row.add_row(
        Text(name, style="bold"),
        ProgressBar(total=steps, completed=step, width=24),
        f"{step}/{steps}{_facts(progress)}",
    )
    return row


def _counted(progress: dict[str, Any]) -> str:
    """How many rows a phase has gone through."""
    rows = progress.get("counts", {}).get("rows")
    return f"{rows:,} rows" if rows else ""


def _sample_line(sample: dict[str, Any], width: int) -> Text:
    """A sample in one line: score, end of the prompt, beginning of the completion; without control characters."""
    prompt, completion = (
        "".join(char if char.isprintable() else " " for char in sample[part]) for part in ("prompt", "completion")
    )
    shown = prompt if len(prompt) <= width // 3 else f"...{prompt[-(width // 3) :]}"
    line = Text(f"{sample['score']:>8.3g}  {shown} -> {completion}", style="dim")
    line.truncate(width - 1)
    return line


def _facts(progress: dict[str, Any]) -> str:
    """Loss, key metrics, speed and time left, as far as they are known."""
    facts = [f"{key.rpartition('/')[2]} {value:.4g}" for key, value in progress["metrics"].items() if value is not None]
    if progress["tokens_per_s"]:
        facts.append(f"{progress['tokens_per_s']:,.0f} tokens/s")
    if progress["seconds_left"] is not None:
        facts.append(f"{duration(progress['seconds_left'])} left")
    return "".join(f"  {fact}" for fact in facts)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
