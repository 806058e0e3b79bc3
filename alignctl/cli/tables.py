"""What would run, for people."""

from __future__ import annotations

import shlex
from typing import Any

from alignctl.config.stages import StageConfig
from alignctl.data.settings import DataSettings
from alignctl.data.sources import BUILTIN_SOURCES, shown
from alignctl.methods.registry import methods
from alignctl.plan.plan import RunPlan, StagePlan
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.paths import StagePaths
from alignctl.run.state import is_done


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
            **({} if makes else {"global batch": f"{_batch(stage)} per optimizer step"}),
            **({} if config.distributed.type == "none" else {"processes": _processes(config)}),
            "output": stage.output,
            "state": _state(plan.paths.stage(config.name)),
        }
        print(f"\n{number}. {config.name} ({config.method})")
        for name, fact in facts.items():
            print(f"   {name:<13} {fact}")
        settings = " ".join(f"{key}={value}" for key, value in sorted(stage.environment.items()))
        print(f"   $ {settings} {shlex.join(stage.command)}")


def _batch(stage: StagePlan) -> str:
    """What an optimizer step takes, and how that comes about where more than one process or batch has a part in it."""
    config = stage.config
    if methods()[config.method].data_kind == "prompts":
        return f"{stage.global_batch_size:,} completions"
    steps, processes = config.trainer.get("gradient_accumulation_steps", 1), config.launcher.world_size
    size = stage.global_batch_size // steps // processes
    parts = [
        f"{size:,}",
        f"{steps:,} accumulated" if steps > 1 else "",
        f"{processes:,} processes" if processes > 1 else "",
    ]
    made = " x ".join(filter(None, parts))
    return f"{stage.global_batch_size:,} rows" + (f" ({made})" if steps * processes > 1 else "")


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
