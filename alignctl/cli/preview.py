"""`alignctl data preview`: rows as the trainer sees them. Torch-free; a child reads them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from alignctl.checks.problems import checked
from alignctl.cli.display import Display
from alignctl.cli.summary import not_as_they_are
from alignctl.config.compose import list_recipes, read_request
from alignctl.config.schema import RunSettings
from alignctl.errors import RequestError
from alignctl.launch.beforehand import preview_rows
from alignctl.plan.freeze import absolute_paths, read_plan
from alignctl.plan.plan import RunPlan, make_plan
from alignctl.run.paths import PLAN, RunPaths

_STYLES = {"trained": "bold green", "context": "", "cut": "red strike"}
_MARKS = {"trained": ("{+", "+}"), "context": ("", ""), "cut": ("[-", "-]")}
"""Around what is shown without colours, as git marks words."""
_COUNTS = {
    "read": "read", "kept": "kept", "held_out": "held out", "lost": "lost", "num_skipped": "skipped", "ties": "tied",
    "cut": "cut", "partly": "used in part",
}  # fmt: skip
"""Of what data.json says of rows."""


def preview_command(
    source: str,
    overrides: Sequence[str],
    recipe_dirs: Sequence[Path],
    method: str | None,
    model: str | None,
    stage: str | None,
    row: int | None,
    worst: str | None,
    count: int,
    as_json: bool,
) -> None:
    """Shows rows of a file, a Hub id or a run.

    Raises:
        RequestError: They would be refused, or what is asked does not go together.
    """
    if row and worst:
        raise RequestError("`--row` and `--worst` exclude each other", "give one of them")
    if (Path(source) / PLAN).exists():
        if method or model or overrides:
            raise RequestError(
                f"{source} is a run, which has its method, its model and its settings",
                f"`alignctl data preview {shlex.quote(source)}`, with `--stage` where it has several",
            )
        plan = read_plan(RunPaths(Path(source).resolve()))
    else:
        plan = _plan(source, overrides, recipe_dirs, method, model)
    line = _line(plan, stage)
    (most,) = (one.config.data.max_skipped for one in plan.stages if one.config.name == line[-1])
    asked = {"row": row, "worst": worst, "count": count, "max_skipped": most}
    with Display(RunSettings.log_every, quiet=as_json) as display:
        found = preview_rows(_skipping_any(plan), line, asked, display)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)


def _plan(
    source: str, overrides: Sequence[str], recipe_dirs: Sequence[Path], method: str | None, model: str | None
) -> RunPlan:
    """A run of one stage on the rows, none of them held out, that is never begun."""
    local = {recipe.name.removesuffix("_local"): recipe.name for recipe in list_recipes(recipe_dirs)
             if recipe.name.endswith("_local")}  # fmt: skip
    named = any(override.startswith("recipe=") for override in overrides)
    if not named and method not in local:
        raise RequestError(
            f"`--for {method}`: there is no recipe for rows of one's own by this method" if method else
            f"{source} is no run: say what the rows are for",
            f"`--for` one of {', '.join(sorted(local))}, or `recipe=...` of one stage",
        )  # fmt: skip
    given = [] if named else [f"recipe={local[method or '']}"]
    given += [f"data.path={source}", *([f"model.path={model}"] if model else []), *overrides]
    request = read_request(given, recipe_dirs)
    plan = make_plan(absolute_paths(checked(request)), request.recipe.name, Path("preview").resolve())
    return _with_data(plan, eval_rows=0)


def _skipping_any(plan: RunPlan) -> RunPlan:
    """A plan whose rows are shown, whether or not a run would refuse them."""
    return _with_data(plan, max_skipped=1.0)


def _with_data(plan: RunPlan, **settings: Any) -> RunPlan:
    """A plan with other settings of the rows of all stages."""
    stages = tuple(
        dataclasses.replace(one, config=dataclasses.replace(
            one.config, data=dataclasses.replace(one.config.data, **settings)
        ))
        for one in plan.stages
    )  # fmt: skip
    return dataclasses.replace(plan, stages=stages)


def _line(plan: RunPlan, name: str | None) -> list[str]:
    """A stage of a plan, and before it those that it starts from."""
    stages = {stage.config.name: stage.config for stage in plan.stages}
    name = name or next(iter(stages))
    if name not in stages:
        raise RequestError(f"`--stage {name}` is not among the stages", f"they are {', '.join(stages)}")
    line = [name]
    while before := stages[line[0]].start_from:
        line.insert(0, before)
    return line


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    rows = found["rows"]
    counts = ", ".join(f"{rows[key]:,} {word}" for key, word in _COUNTS.items() if rows[key] or key == "kept")
    click.echo(f"{rows['source']}: rows of the format `{rows['format']}`: {counts}")
    for notice in [*found["notices"], *not_as_they_are("train", rows, all_in="--json")]:
        click.echo(f"notice: {notice}")
    for problem in found["refused"]:
        click.echo(f"a run would be refused: {problem['message']}\n  hint: {problem['hint']}")
    marks = ["trained", "context", "cut"]
    legend = [Text(name, _STYLES[name]) if coloured else Text(name.join(_MARKS[name])) for name in marks]
    console.print(Text(", ").join(legend))
    for row in found["shown"]:
        for one in row["sequences"]:
            lengths = ", ".join(f"{one[name]:,} {name}" for name in marks if one[name])
            margin = f"; margin {row['margin']:g}" if "margin" in row else ""
            console.print(Text(f"\nrow {row['row']:,}, {one['name']}: {lengths}{margin}", "bold" if coloured else ""))
            for part in one["parts"]:
                text = part["text"] if coloured else part["text"].join(_MARKS[part["state"]])
                console.print(Text(text, _STYLES[part["state"]] if coloured else ""), end="")
            console.print()
            for part in one["parts"]:
                click.echo(f"  {part['state']}: {' '.join(map(str, part['ids']))}")
