"""Tables and JSON of plans and results."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from alignctl.plan.plan import RunPlan
from alignctl.run.files import read_json

# Metric, how people call it, and whether it is a share.
METRICS = (
    ("right", "right answers", True),
    ("wanted_manner", "wanted manner", True),
    ("preference_accuracy", "preference accuracy", True),
    ("reward_accuracy", "reward accuracy", True),
    ("kl", "KL to the reference (nats/answer)", False),
    ("answer_tokens", "answer length (tokens)", False),
    ("loss", "held-out loss", False),
)


def print_plan(plan: RunPlan) -> None:
    """What would run, stage by stage, with the commands."""
    print(f"recipe {plan.recipe}, run directory {plan.run_dir}")
    for number, stage in enumerate(plan.stages, start=1):
        config = stage.config
        held_out = config.data.eval_path or config.data.eval_split or "a part of it"
        facts = {
            "start": stage.start,
            "data": f"{config.data.path}, held out: {held_out}",
            "trained": stage.trained,
            "models": ", ".join(stage.roles),
            "global batch": f"{stage.global_batch_size} per device and optimizer step",
            "output": stage.output,
        }
        print(f"\n{number}. {config.name} ({config.method})")
        for name, fact in facts.items():
            print(f"   {name:<13} {fact}")
        settings = " ".join(f"{key}={value}" for key, value in sorted(stage.environment.items()))
        print(f"   $ {settings} {shlex.join(stage.command)}")


def run_summary(plan: RunPlan) -> dict[str, Any]:
    """What a finished run did and measured, for `--json` and the table."""
    stages = {}
    for stage in plan.stages:
        paths = plan.paths.stage(stage.config.name)
        rows = read_json(paths.data) or {}
        stages[stage.config.name] = {
            "method": stage.config.method,
            "model": str(paths.model),
            "rows": {part: _row_counts(ledger) for part, ledger in rows.items() if ledger},
            **(read_json(paths.result) or {}),
        }
    return {"recipe": plan.recipe, "run_dir": plan.run_dir, "stages": stages}


def _row_counts(ledger: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": ledger["source"],
        "read": ledger["read"],
        "kept": ledger["kept"],
        "skipped": len(ledger["skipped"]),
        "skipped_rows": list(map(int, ledger["skipped"])),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Before and after of the last stage, skipped rows, and where the model is."""
    console = Console(highlight=False, soft_wrap=True)
    name, stage = list(summary["stages"].items())[-1]
    table = Table(title=f"{summary['recipe']}: stage {name}, on held-out data", title_justify="left")
    table.add_column("")
    before = stage.get("before")
    if before:
        table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for key, title, share in METRICS:
        values = [part.get(key) for part in ([before] if before else []) + [stage["after"]]]
        if any(value is not None for value in values):
            table.add_row(title, *(_number(value, share) for value in values))
    if "win_rate" in stage:
        table.add_row("win rate against before", *([""] if before else []), _number(stage["win_rate"], True))
    console.print(table)
    for stage_name, other in summary["stages"].items():
        for part, rows in other["rows"].items():
            if rows["skipped"]:
                shown = ", ".join(map(str, rows["skipped_rows"][:10]))
                more = " and others, see data.json" if rows["skipped"] > 10 else ""
                console.print(
                    f"{stage_name}: {rows['skipped']} of {rows['read']} {part} rows skipped: {shown}{more}",
                    markup=False,
                )
    console.print(f"model: {stage['model']}", markup=False)


def print_comparison(points: list[tuple[str, dict[str, Any]]]) -> None:
    """One row for each point of a sweep: what was varied and what the last stage measured after."""
    measured = [list(summary["stages"].values())[-1] for _, summary in points]
    keys = [metric for metric in METRICS if any(metric[0] in stage["after"] for stage in measured)]
    table = Table(title="sweep, last stage, on held-out data", title_justify="left")
    table.add_column("point")
    for _, title, _ in keys:
        table.add_column(title, justify="right")
    wins = any("win_rate" in stage for stage in measured)
    if wins:
        table.add_column("win rate against before", justify="right")
    for (point, _), stage in zip(points, measured, strict=True):
        cells = [_number(stage["after"].get(key), share) for key, _, share in keys]
        table.add_row(point, *cells, *([_number(stage.get("win_rate"), True)] if wins else []))
    Console(highlight=False).print(table)


def _number(value: float | None, share: bool) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if share else f"{value:.3f}"
