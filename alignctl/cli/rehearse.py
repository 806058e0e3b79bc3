"""`alignctl rehearse --as RANK/N`: what one process of many would hold and send. Torch-free; a child does it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, read_request
from alignctl.errors import AlignctlError, RequestError
from alignctl.launch.alone import run_alone, temporary_run
from alignctl.plan.alone import (
    check_can_be_made,
    check_machines,
    draws,
    is_numberless,
    longest,
    read_place,
    stood_in,
    with_processes,
    without_vllm,
)
from alignctl.plan.freeze import absolute_paths
from alignctl.plan.memory import Held, Place, held, writes
from alignctl.plan.plan import RunPlan, StagePlan, make_plan
from alignctl.plan.shapes import shape_of
from alignctl.run.disk import shown_bytes

_USUAL = 1024  # tokens of a sequence, where nothing says how many
_FAR = 2.0  # per cent, by which what is held may differ from what was planned


def rehearse_command(
    overrides: Sequence[str],
    recipe_dirs: Sequence[Path],
    given: str,
    stage_name: str | None,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Checks and plans a recipe for so many processes, lets a child take the place of one, and compares.

    Raises:
        RequestError: Something is wrong with the recipe, the place, or how the two go together.
        AlignctlError: What is held is not what was planned, or the child failed.
    """
    place, request = read_place(given), read_request(overrides, recipe_dirs)
    check_machines(request.overrides)
    with temporary_run() as folder:
        composed, problems = compose(request)
        config = without_vllm(with_processes(composed, place, folder))
        if problems := problems + find_problems(config):
            raise RequestError.from_problems(list(dict.fromkeys(problems)))
        plan = make_plan(absolute_paths(config), request.recipe.name, Path(folder))
        stage = _stage(plan, stage_name)
        shape = check_can_be_made(stage.config, shape_of(stage.config.model))
        alone = stood_in(stage.config, shape)
        planned, numberless = held(alone, shape, place), is_numberless(alone, shape)
        most = longest(alone)
        if tokens and most and tokens > most:
            raise RequestError(
                f"`--tokens {tokens}`: `{alone.name}` takes no sequences of more than {most:,} tokens",
                f"give {most} or fewer, or set another limit",
            )
        tokens = tokens or most or _USUAL
        began = time.monotonic()
        only = dataclasses.replace(plan, stages=(dataclasses.replace(stage, config=alone),))
        seen = run_alone(only, config, place, tokens, numberless)
        seconds = round(time.monotonic() - began, 1)
    report = {
        **_who(plan, stage, place),
        "tokens": tokens, "passes": seen["passes"], "numberless": numberless, "seconds": seconds,
        "held": _compared(_held(seen), _held(planned.to_dict()) if planned else {}),
        "sent": _compared_sent(seen, None if draws(alone) else planned),
        "checkpoint": writes(alone, place, seen["trained"], seen["optimizer"]),
    }  # fmt: skip
    click.echo(json.dumps(report, indent=2) if as_json else _shown(report))
    if far := _far(report):
        raise AlignctlError(
            f"more or less is held or sent than planned: {', '.join(far)}",
            "this is an error of alignctl's plan, or of the stage: please report it",
        )


def _stage(plan: RunPlan, name: str | None) -> StagePlan:
    names = [stage.config.name for stage in plan.stages]
    if name is None:
        return plan.stages[0]
    if name not in names:
        raise RequestError(f"`--stage {name}` is not among the stages of the recipe", f"it has {', '.join(names)}")
    return plan.stages[names.index(name)]


def _who(plan: RunPlan, stage: StagePlan, place: Place) -> dict[str, Any]:
    launcher = stage.config.launcher
    return {
        "recipe": plan.recipe, "stage": stage.config.name, "method": stage.config.method,
        "trained": stage.trained, "distributed": stage.config.distributed.type,
        "rank": place.rank, "processes": place.processes, "machines": launcher.nodes,
        "global_batch_size": stage.global_batch_size,
    }  # fmt: skip


def _held(found: Mapping[str, Any]) -> dict[str, int | None]:
    weights = {f"weights of {role.replace('_', ' ')}": size for role, size in found["weights"].items()}
    return weights | {"gradients": found["gradients"], "optimizer state": found["optimizer"]}


def _compared(seen: Mapping[str, int | None], planned: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
    return {name: _beside(size, planned.get(name)) for name, size in seen.items()}


def _compared_sent(seen: Mapping[str, Any], planned: Held | None) -> dict[str, dict[str, Any]]:
    """Collectives of a step; what passes gather is planned by the pass.

    Args:
        planned: None where that is not known: of completions nobody knows how long they get, nor how many steps the
            optimizer takes with them.
    """
    wanted: dict[str, int | None] = {}
    if planned is not None:
        wanted = {
            "weights": planned.gathered_in(seen["runs"], seen["passes"]),
            "gradients": planned.reduced_in(seen["passes"]),
        }
    return {
        kind: {"count": one["count"], **_beside(one["bytes"], wanted.get(kind))}
        for kind, one in seen["collectives"].items()
    }


def _beside(size: int | None, planned: int | None) -> dict[str, Any]:
    off = None if planned is None or size is None else round(100 * (size - planned) / max(planned, 1), 2)
    return {"bytes": size, "planned": planned, "off_percent": off}


def _far(report: Mapping[str, Any]) -> list[str]:
    """What differs by too much."""
    return [
        f"{name} ({one['bytes']:,} bytes, planned {one['planned']:,})"
        for part in ("held", "sent")
        for name, one in report[part].items()
        if one["off_percent"] is not None and abs(one["off_percent"]) > _FAR
    ]


def _shown(report: Mapping[str, Any]) -> str:
    each = report["processes"] // report["machines"]
    how = "without numbers" if report["numberless"] else "random"
    lines = [
        f"{report['recipe']}, stage {report['stage']} ({report['method']}, {report['trained']}) as rank "
        f"{report['rank']} of {report['processes']:,}: {report['machines']} x {each}, {report['distributed']}",
        f"global batch {report['global_batch_size']:,} per optimizer step, sequences of {report['tokens']:,} tokens, "
        f"passes a step: {report['passes']}; weights {how}; {report['seconds']:g} s",
        "",
        _line("held", "", "bytes", "planned", ""),
        *(_line(name, "", *_sizes(one)) for name, one in report["held"].items()),
        "",
        _line("sent in a step", "count", "bytes", "planned", ""),
        *(_line(name, f"{one['count']:,}", *_sizes(one)) for name, one in report["sent"].items()),
        "",
        f"a checkpoint: {report['checkpoint']['bytes']:,} bytes in {', '.join(report['checkpoint']['files'])}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, *cells: str) -> str:
    return f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells)


def _sizes(one: Mapping[str, Any]) -> list[str]:
    known = [one["bytes"], one["planned"]]
    off = one["off_percent"]
    return [*("" if size is None else shown_bytes(size) for size in known), "" if off is None else f"{off:+.1f} %"]
