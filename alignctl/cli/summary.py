"""What finished stages measured, and what became of their rows: tables and JSON. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from alignctl.cli.advice import advice
from alignctl.cli.terminal import say
from alignctl.config.stages import StageConfig
from alignctl.methods.registry import methods
from alignctl.plan.plan import RunPlan
from alignctl.run.files import read_json_lines, read_record
from alignctl.run.forms import LEDGERS, RESULT
from alignctl.run.paths import StagePaths
from alignctl.run.products import read_manifest

_NAMED = 10  # rows of a reason
_REASONS = 5  # that are told
_WORDS = {"skipped": "skipped", "lost": "lost", "partly": "used in part", "ties": "tied", "cut": "cut"}
_SCORE, _STD = "rewards/", "_std"  # of each source of rewards, as training logs it
_EDGES = 4  # characters that the first column of a table takes beside its text, each of the others one less
_MEANING = "In brackets 95 % intervals; n: rows or answers; noise: may be chance."


@dataclass(frozen=True)
class Metric:
    """How a measured number is shown."""

    key: str
    title: str
    short: str
    """Heads a column."""
    is_fraction: bool

    def text(self, measured: Mapping[str, float], interval: list[float] | None = None) -> str:
        """The number, with its deviation where there is one, or with the interval that it lies in."""
        value, deviation = measured.get(self.key), measured.get(self.key + _STD)
        if value is None:
            return ""
        if deviation is not None:
            return f"{value:.3g} ± {deviation:.2g}"
        if not self.is_fraction:
            return f"{value:.3f}"
        return f"{value:.1%}" + (f" ({interval[0] * 100:.0f}-{interval[1] * 100:.0f})" if interval else "")

    def change(self, before: Mapping[str, float], after: Mapping[str, float], within_noise: bool | None) -> str:
        """What became of it: of shares in points of a hundred."""
        then, now = before.get(self.key), after[self.key]
        if then is None:
            return "noise" if within_noise else ""
        if then == now:
            return "same"
        if within_noise:
            return "noise"
        return f"{(now - then) * 100:+.1f}" if self.is_fraction else f"{now - then:+.3g}"


METRICS = (
    Metric("right", "right answers", "right", True),
    Metric("wanted_manner", "wanted manner", "manner", True),
    Metric("preference_accuracy", "preference accuracy", "pref. acc.", True),
    Metric("preference_accuracy_per_token", "  the same per token", "per token", True),
    Metric("reward_accuracy", "reward accuracy", "reward acc.", True),
    Metric("label_auc", "labels told apart (AUC)", "AUC", True),
    Metric("accuracy", "reward model accuracy", "RM acc.", True),
    Metric("margin", "reward model margin", "margin", False),
    Metric("kl", "KL to reference (nats)", "KL", False),
    Metric("answer_tokens", "answer length (tokens)", "tokens", False),
    Metric("loss", "held-out loss", "loss", False),
    Metric("win_rate", "win rate against before", "win rate", True),
)


def run_summary(plan: RunPlan) -> dict[str, Any]:
    """What a finished run did and measured, for `--json` and the table."""
    stages = {}
    for stage in plan.stages:
        paths = plan.paths.stage(stage.config.name)
        rows = read_record(paths.data, LEDGERS) or {}
        stages[stage.config.name] = {
            "method": stage.config.method,
            **_made(stage.config, paths),
            "rows": {part: _row_counts(ledger) for part, ledger in rows.items() if ledger},
            **(result := read_record(paths.result, RESULT) or {}),
            "advice": advice(stage.config, result, rows, read_json_lines(paths.metrics)),
        }
    return {"recipe": plan.recipe, "run_dir": plan.run_dir, "stages": stages}


def _made(stage: StageConfig, paths: StagePaths) -> dict[str, Any]:
    """The product of a stage: where it is, and of rows what they are, too."""
    if methods()[stage.method].product == "model":
        return {"adapter": str(paths.adapter)} if stage.leaves_adapter else {"model": str(paths.model)}
    manifest = read_manifest(paths.rows)
    facts = {"kind": manifest.kind, "count": manifest.count, "columns": manifest.columns} if manifest else {}
    return {"made": {"folder": str(paths.rows.root)} | facts}


def _row_counts(ledger: dict[str, Any]) -> dict[str, Any]:
    counts = (
        "source", "read", "kept", "held_out", "shared_prompts", "lost", "partly", "ties", "agreement", "cut", "lengths",
        "reasons",
    )  # fmt: skip
    return (
        {name: ledger[name] for name in counts if name in ledger}
        | {
            "skipped": ledger["num_skipped"],
            "skipped_rows": [int(row) for row in ledger["skipped"] if row.isdigit()],
        }
        | ({"parts": ledger["parts"]} if ledger.get("parts") else {})
    )


def print_summary(summary: dict[str, Any]) -> None:
    """What each stage measured, what became of rows that were not trained on as they are, and where the last model or
    adapter is."""
    console = Console(highlight=False, markup=False)
    print_measured(summary, console)
    for name, stage in summary["stages"].items():
        for part, rows in stage["rows"].items():
            for line in not_as_they_are(part, rows):
                say(console, f"{name}: {line}")
            for source in rows.get("parts", []):
                say(console, f"{name}: {_share(part, source)}")
        if "made" in stage:
            made = stage["made"]
            say(console, f"{name}: made {made['count']:,} rows ({made['kind']}): {made['folder']}")
    last = list(summary["stages"].values())[-1]
    for key in ("model", "adapter"):
        if key in last:
            say(console, f"{key}: {last[key]}")


def print_measured(summary: dict[str, Any], console: Console) -> None:
    """A table for each stage that is done, what its words mean, and what the numbers advise."""
    done = {name: stage for name, stage in summary["stages"].items() if "after" in stage}
    for name, stage in done.items():
        if _measured(stage):
            console.print(f"{summary['recipe']}: stage {name}, on held-out data", style="italic")
            console.print(_table(stage))
        else:
            console.print(f"stage {name}: no held-out rows, so nothing was measured")
    if any(stage.get("certainty") for stage in done.values()):
        console.print(_MEANING, style="dim")
    for name, stage in done.items():
        for line in stage["advice"]:
            say(console, f"advice for {name}: {line}")


def _table(stage: dict[str, Any]) -> Table:
    """What a stage measured before and after; 80 columns wide at most."""
    before, after, certainty = stage.get("before"), _measured(stage), stage.get("certainty", {})
    table = Table()
    table.add_column("", overflow="fold")
    for heading in ("before", "after") if before else ("after",):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    if before:
        table.add_column("change", justify="right", no_wrap=True)
    for metric in _metrics(after):
        sure = certainty.get(metric.key, {})
        cells = [metric.text(after, sure.get("after")), str(sure.get("n", ""))]
        if before:
            cells = [metric.text(before, sure.get("before")), *cells]
            cells.append(metric.change(before, after, sure.get("within_noise")))
        table.add_row(metric.title, *cells)
    return table


def _metrics(measured: Mapping[str, float]) -> Iterator[Metric]:
    """How what was measured is shown, in order: what every method may have, then losses of held-out sets by name, and
    scores by the sources of rewards."""
    yield from (metric for metric in METRICS if metric.key in measured)
    for key in measured:
        if key.endswith("_loss"):
            yield Metric(key, f"held-out loss, {key.removesuffix('_loss')}", key, False)
        elif key.startswith(_SCORE) and not key.endswith(_STD):
            yield Metric(key, f"score, {key.removeprefix(_SCORE)}", key.removeprefix(_SCORE), False)


def _share(part: str, source: dict[str, Any]) -> str:
    """What one of several sources has of all rows, or of their tokens."""
    rows, tokens = f"{source['rows']:,} {part} rows of {source['source']}", source["tokens"]
    share = f"{source['share']:.1%} of all"
    return f"{rows}, {share}" if tokens is None else f"{rows}, {tokens:,} tokens, {share}"


def print_comparison(points: list[tuple[str, dict[str, Any]]]) -> None:
    """One row for each point of a sweep: what was varied and what the last stage measured after."""
    measured = [_measured(list(summary["stages"].values())[-1]) for _, summary in points]
    shown = {metric.key: metric for values in measured for metric in _metrics(values)}
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    console.print("sweep: last stage, after, on held-out data", style="italic")
    widest = min(max(map(len, ["point", *(point for point, _ in points)])), console.width // 3)
    for part in _side_by_side(list(shown.values()), measured, console.width - widest - _EDGES):
        table = Table()
        table.add_column("point", overflow="fold", min_width=widest, max_width=widest)
        for metric in part:
            table.add_column(metric.short, justify="right", no_wrap=True)
        for (point, _), values in zip(points, measured, strict=True):
            table.add_row(point, *(metric.text(values) for metric in part))
        console.print(table)


def _side_by_side(metrics: list[Metric], measured: list[dict[str, float]], room: int) -> Iterator[list[Metric]]:
    """Metrics as columns of as many tables as they need."""
    part: list[Metric] = []
    left = room
    for metric in metrics:
        width = max(map(len, [metric.short, *(metric.text(values) for values in measured)])) + _EDGES - 1
        if part and width > left:
            yield part
            part, left = [], room
        part.append(metric)
        left -= width
    if part:
        yield part


def _measured(stage: dict[str, Any]) -> dict[str, float]:
    return stage.get("after", {}) | ({"win_rate": stage["win_rate"]} if "win_rate" in stage else {})


def not_as_they_are(part: str, rows: dict[str, Any], all_in: str = "data.json") -> Iterator[str]:
    """What became of rows that were left out or shortened, with the first of them: a line for each reason.

    Args:
        all_in: Where the others are.
    """
    told: Counter[str] = Counter()
    for one in rows["reasons"]:
        what, count = one["what"], f"{one['count']:,} of {rows['read']:,} {part} rows"
        told[what] += 1
        if told[what] <= _REASONS:
            named = ", ".join(_place(row, rows["source"]) for row in one["first"][:_NAMED])
            more = f" and others, see {all_in}" if one["count"] > _NAMED else ""
            yield f"{count} {_WORDS[what]} ({one['why']}): {named}{more}"
    for what, reasons in told.items():
        if reasons > _REASONS:
            yield f"{part} rows {_WORDS[what]} for {reasons - _REASONS:,} more reasons, see {all_in}"


def _place(row: dict[str, Any], source: str) -> str:
    """A row, and its file and line where these are others."""
    where = [row["file"]] if row.get("file", source) != source else []
    where += [f"line {row['line']}"] if row.get("line") not in (None, row["row"]) else []
    return f"{row['row']}" + (f" ({', '.join(where)})" if where else "")
