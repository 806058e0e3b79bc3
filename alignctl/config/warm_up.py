"""Whether the warm-up of a stage leaves anything of its training. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.errors import Problem

_WITHOUT = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that do not warm up."""


def _decay_problem(name: str, stage: Mapping[str, Any], steps: int) -> Problem | None:
    """A schedule that is to decay for longer than it has would never have its whole rate."""
    given = stage.get("lr_scheduler_kwargs")
    decay = given.get("num_decay_steps") if isinstance(given, Mapping) else None
    if not isinstance(decay, int) or decay < max(steps, 1):
        return None
    return Problem(
        f"`{name}.lr_scheduler_kwargs.num_decay_steps={decay}` takes the whole training: it has {steps:,} optimizer "
        f"step{'s' if steps > 1 else ''}",
        f"set it below {steps:,}",
    )


def warm_up_problem(name: str, stage: Mapping[str, Any], steps: int) -> Problem | None:
    """What is wrong with the warm-up of a stage of so many optimizer steps, or with how it decays. A share of the steps
    always leaves one."""
    warm_up = stage.get("warmup_steps", 0)
    if not isinstance(warm_up, (int, float)) or warm_up < max(steps, 1):
        return _decay_problem(name, stage, steps)
    if stage.get("lr_scheduler_type") in _WITHOUT:
        return None
    plural = "s" if steps > 1 else ""
    return Problem(
        f"`{name}.warmup_steps={warm_up:g}` takes the whole training: it has {steps:,} optimizer step{plural}",
        f"set it below {steps:,}, or give a share of the steps, `{name}.warmup_steps=0.1`",
    )
