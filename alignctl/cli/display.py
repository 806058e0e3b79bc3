"""Shows a run on standard error: one live line at a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alignctl.cli.terminal import say
from alignctl.plan.plan import StagePlan

_COUNTED_EVERY_S = 30  # plain lines about how far a phase is
_TRAINING = "training"
_BAR, _SHORT_BAR, _NAME = 24, 16, 20  # columns of the live line, the name's at most


class Display:
    """Watches a run. Use as a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, every: int, quiet: bool = False):
        """Takes the optimizer steps between two plain lines, and whether it is to say nothing."""
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        terminal = self._console.is_terminal
        self._live = Live(console=self._console, transient=True, refresh_per_second=8) if terminal else None
        self._every = every
        self._phase: tuple[str, str] | None = None
        """Of which stage, and what it does."""
        self._began_s = 0.0  # the phase
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
        say(self._console, text)

    def notice(self, text: str) -> None:
        """Says what people should know, after the word `notice`, as `say_notice` does."""
        self.say(f"notice: {text}")

    def started(self, stage: StagePlan, step: int | None) -> None:
        verb = f"continues after step {step}" if step else "starts"
        self._end_phase()
        self._step_said, self._notices_said = -1, 0
        self.say(f"{stage.config.name}: {verb} ({stage.config.method}, from {stage.start})")

    def finished(self, stage: StagePlan, seconds: float) -> None:
        self._end_phase()
        if self._live:
            self._live.update("", refresh=True)
        self.say(f"{stage.config.name}: done in {duration(seconds)}")

    def progress(self, stage: StagePlan, progress: dict[str, Any]) -> None:
        name = stage.config.name
        notices = progress.get("notices", [])
        for notice in notices[self._notices_said :]:
            self.say(f"{name}: {notice}")
        self._notices_said = len(notices)
        phase = _TRAINING if "step" in progress else progress["phase"]
        if begins := (name, phase) != self._phase:
            self._end_phase()
            self._phase, self._began_s = (name, phase), time.monotonic()
        if self._live:
            width = self._console.width
            samples = [_sample_line(sample, width) for sample in progress.get("samples", ())]
            line = _live_line(name, progress, time.monotonic() - self._began_s, width)
            self._live.update(Group(line, *samples))
            return
        training = progress if "step" in progress else progress.get("trained")
        if training:
            self._say_step(name, training)
        if "step" in progress:
            return
        counted = _counted(progress)
        if begins:
            self._counted_s = time.monotonic()
            self.say(f"{name}: {phase}")
        elif counted and time.monotonic() > self._counted_s + _COUNTED_EVERY_S:
            self._counted_s = time.monotonic()
            self.say(f"{name}: {phase}: {counted}")

    def _end_phase(self) -> None:
        """Leaves a line of a phase that is over; plain lines say when one begins."""
        if self._phase and self._live:
            name, phase = self._phase
            done = "\u2713" if self._console.encoding.startswith("utf") else "done:"
            self.say(f"{name}: {done} {phase}, {duration(time.monotonic() - self._began_s)}")
        self._phase = None

    def _say_step(self, name: str, training: dict[str, Any]) -> None:
        """A plain line at the start, every so many steps, and at the last."""
        step, last = training["step"], training["max_steps"]
        due = self._step_said < 0 or step // self._every > self._step_said // self._every or step == last
        if due and step != self._step_said:
            self._step_said = step
            self.say(f"{name}: step {step}/{last}{''.join(f'  {fact}' for fact in _facts(training))}")


def _live_line(name: str, progress: dict[str, Any], seconds: float, width: int) -> Table:
    """A bar with how far it is, where that is known, and no more than has room in a line."""
    at, end, facts = progress.get("step"), progress.get("max_steps"), []
    title = [Text(name if cell_len(name) <= _NAME else f"{name[: _NAME - 3]}...", style="bold")]
    if at is not None:
        facts = [f"{at:,}/{end:,}", *_facts(progress)]
    elif end := progress.get("total"):
        at = min(progress.get("counts", {}).get(progress["unit"], 0), end)
        facts = [f"{progress['phase']} {at:,}/{end:,}"]
        facts += [f"{duration(seconds / at * (end - at))} left"] if at else []
    else:
        counted = _counted(progress)
        facts = [progress["phase"], *([counted] if counted else [])]
    long = _BAR if "step" in progress else _SHORT_BAR
    bar = [ProgressBar(total=end, completed=at, width=long)] if end else []
    room = width - 1 - cell_len(title[0].plain) - 1 - (long + 1 if bar else 0)
    while len(facts) > 2 and cell_len("  ".join(facts)) > room:
        del facts[-2]  # the first says how far it is, the last how long it takes
    said = Text("  ".join(facts), no_wrap=True)
    said.truncate(room, overflow="ellipsis")
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(*title, *bar, said)
    return line


def _counted(progress: dict[str, Any]) -> str:
    """How many rows a phase has gone through, of how many where that is known."""
    unit, counts = progress.get("unit", "rows"), progress.get("counts", {})
    if not counts.get(unit):
        return ""
    of = f" of {progress['total']:,}" if progress.get("total") else ""
    return f"{counts[unit]:,}{of} {unit}"


def _sample_line(sample: dict[str, Any], width: int) -> Text:
    """A sample in one line: score, end of the prompt, beginning of the completion; without control characters."""
    prompt, completion = (
        "".join(char if char.isprintable() else " " for char in sample[part]) for part in ("prompt", "completion")
    )
    shown = prompt if len(prompt) <= width // 3 else f"...{prompt[-(width // 3) :]}"
    line = Text(f"{sample['score']:>8.3g}  {shown} -> {completion}", style="dim")
    line.truncate(width - 1)
    return line


def _facts(progress: dict[str, Any]) -> list[str]:
    """Loss, key metrics, speed and time left, as far as they are known."""
    facts = [f"{key.rpartition('/')[2]} {value:.4g}" for key, value in progress["metrics"].items() if value is not None]
    if progress["tokens_per_s"]:
        facts.append(f"{progress['tokens_per_s']:,.0f} tokens/s")
    if progress["seconds_left"] is not None:
        facts.append(f"{duration(progress['seconds_left'])} left")
    return facts


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
