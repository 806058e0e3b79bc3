"""Tables and JSON of plans and results."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from alignctl.config.stages import StageConfig
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, shown
from alignctl.methods.registry import methods
from alignctl.plan.plan import RunPlan, StagePlan
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json
from alignctl.run.paths import StagePaths
from alignctl.run.products import read_manifest
from alignctl.run.state import is_done

_NAMED = 10  # rows of a reason
_REASONS = 5  # that are told
_WORDS = {"skipped": "skipped", "lost": "lost", "partly": "used in part", "ties": "tied", "cut": "cut"}


@dataclass(frozen=True)
class Metric:
    """How a measured number is shown."""

    key: str
    title: str
    short: str
    """Heads a column."""
    is_fraction: bool

    def text(self, measured: Mapping[str, float]) -> str:
        value = measured.get(self.key)
        if value is None:
            return ""
        return f"{value:.1%}" if self.is_fraction else f"{value:.3f}"


METRICS = (
    Metric("right", "right answers", "right", True),
    Metric("wanted_manner", "wanted manner", "manner", True),
    Metric("preference_accuracy", "preference accuracy", "pref. acc.", True),
    Metric("preference_accuracy_per_token", "preference accuracy, per token", "per token", True),
    Metric("reward_accuracy", "reward accuracy", "reward acc.", True),
    Metric("label_auc", "labels told apart (AUC)", "AUC", True),
    Metric("accuracy", "reward model accuracy", "RM acc.", True),
    Metric("margin", "reward model margin", "margin", False),
    Metric("kl", "KL to the reference (nats per answer)", "KL", False),
    Metric("answer_tokens", "answer length (tokens)", "tokens", False),
    Metric("loss", "held-out loss", "loss", False),
    Metric("win_rate", "win rate against before", "win rate", True),
)


def print_plan(plan: RunPlan) -> None:
    """What would run, stage by stage, with the commands."""
    print(f"recipe {plan.recipe}, run directory {plan.run_dir}")
    for number, stage in enumerate(plan.stages, start=1):
        config = stage.config
        method = methods()[config.method]
        makes, spared = method.makes, "reference" if method.does_without_reference(config.trainer) else None
        facts = {
            "start": stage.start,
            "data": _data(config.data, holds_out=not makes),
            **({"makes": makes} if makes else {"trained": stage.trained}),
            "models": ", ".join(_role(stage, role) for role in stage.roles if role != spared),
            **({} if makes else {"global batch": f"{stage.global_batch_size} per optimizer step"}),
            **({} if config.distributed.type == "none" else {"processes": _processes(config)}),
            "output": stage.output,
            "state": _state(plan.paths.stage(config.name)),
        }
        print(f"\n{number}. {config.name} ({config.method})")
        for name, fact in facts.items():
            print(f"   {name:<13} {fact}")
        settings = " ".join(f"{key}={value}" for key, value in sorted(stage.environment.items()))
        print(f"   $ {settings} {shlex.join(stage.command)}")


def _role(stage: StagePlan, role: str) -> str:
    """A role, with the source of its weights where that is not where the stage starts."""
    name, source = role.replace("_", " "), stage.roles[role]
    return name if source == stage.start else f"{name} ({source})"


def _processes(config: StageConfig) -> str:
    launcher, distributed = config.launcher, config.distributed
    together = (("tp_size", distributed.tp_size), ("sp_size", distributed.sp_size))
    return ", ".join(
        (
            f"{launcher.world_size} ({launcher.nodes} x {launcher.processes_per_node})",
            distributed.type,
            *(f"{name} {size}" for name, size in together if size > 1),
        )
    )


def _state(paths: StagePaths) -> str:
    if is_done(paths):
        return "done"
    checkpoint = newest_checkpoint(paths.checkpoints)
    return f"continues after step {checkpoint.step}" if checkpoint else "new"


def _data(data: DataSettings, holds_out: bool) -> str:
    if data.mix:
        path = f"a mixture of {', '.join(map(_entry, data.mix))}"
    else:
        path = f"{data.path} (made by {data.rows_from})" if data.rows_from else shown(data.path)
    return f"{path}, held out: {_held_out(data)}" if holds_out else path


def _entry(entry: dict[str, Any]) -> str:
    weight = entry.get("weight")
    return shown(entry["path"]) if weight is None else f"{shown(entry['path'])} ({weight:g})"


def _held_out(data: DataSettings) -> str:
    if data.eval:
        return ", ".join(f"{name}: {shown(path)}" for name, path in data.eval.items())
    if data.eval_path or data.eval_split:
        return shown(data.eval_path or data.eval_split or "")
    if data.path in BUILTIN_SOURCES:
        return "prompts of its own"
    if 0 < data.eval_rows < 1:
        return f"{data.eval_rows:.3g} of its rows"
    return f"up to {data.eval_rows} of its rows" if data.eval_rows else "none"


def run_summary(plan: RunPlan) -> dict[str, Any]:
    """What a finished run did and measured, for `--json` and the table."""
    stages = {}
    for stage in plan.stages:
        paths = plan.paths.stage(stage.config.name)
        rows = read_json(paths.data) or {}
        stages[stage.config.name] = {
            "method": stage.config.method,
            **_made(stage.config, paths),
            "rows": {part: _row_counts(ledger) for part, ledger in rows.items() if ledger},
            **(read_json(paths.result) or {}),
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
    counts = ("source", "read", "kept", "held_out", "lost", "partly", "ties", "agreement", "cut", "lengths", "reasons")
    return (
        {name: ledger[name] for name in counts}
        | {
            "skipped": ledger["num_skipped"],
            "skipped_rows": list(map(int, ledger["skipped"])),
        }
        | ({"parts": ledger["parts"]} if ledger.get("parts") else {})
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Before and after of the last stage, what became of rows that were not trained on as they are, and where the model
    or the adapter is."""
    console = Console(highlight=False, soft_wrap=True)
    name, stage = list(summary["stages"].items())[-1]
    before, after = stage.get("before"), _measured(stage)
    table = Table(title=f"{summary['recipe']}: stage {name}, on held-out data", title_justify="left")
    for heading in ("", "before", "after") if before else ("", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for metric in METRICS:
        if metric.key in after:
            table.add_row(metric.title, *([metric.text(before)] if before else []), metric.text(after))
    for key in (key for key in after if key.endswith("_loss")):  # of held-out sets
        metric = Metric(key, f"held-out loss, {key.removesuffix('_loss')}", key, False)
        table.add_row(metric.title, *([metric.text(before)] if before else []), metric.text(after))
    whole = [key for key in ("model", "adapter") if key in stage]
    if whole or after:
        console.print(table if after else f"stage {name}: no held-out rows, so nothing was measured")
    for stage_name, other in summary["stages"].items():
        for part, rows in other["rows"].items():
            for line in not_as_they_are(part, rows):
                console.print(f"{stage_name}: {line}", markup=False)
            for source in rows.get("parts", []):
                console.print(f"{stage_name}: {_share(part, source)}", markup=False)
        if "made" in other:
            made = other["made"]
            console.print(f"{stage_name}: made {made['count']:,} rows ({made['kind']}): {made['folder']}", markup=False)
    for key in whole:
        console.print(f"{key}: {stage[key]}", markup=False)


def _share(part: str, source: dict[str, Any]) -> str:
    """What one of several sources has of all rows, or of their tokens."""
    rows, tokens = f"{source['rows']:,} {part} rows of {source['source']}", source["tokens"]
    share = f"{source['share']:.1%} of all"
    return f"{rows}, {share}" if tokens is None else f"{rows}, {tokens:,} tokens, {share}"


def print_comparison(points: list[tuple[str, dict[str, Any]]]) -> None:
    """One row for each point of a sweep: what was varied and what the last stage measured after."""
    measured = [_measured(list(summary["stages"].values())[-1]) for _, summary in points]
    shown = [metric for metric in METRICS if any(metric.key in values for values in measured)]
    table = Table(title="sweep: last stage, after, on held-out data", title_justify="left")
    table.add_column("point", overflow="fold")
    for metric in shown:
        table.add_column(metric.short, justify="right", no_wrap=True)
    for (point, _), values in zip(points, measured, strict=True):
        table.add_row(point, *(metric.text(values) for metric in shown))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    console.print(table)


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
