"""Whether the warm-up of a stage leaves anything of its training. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.errors import Problem

_WITHOUT = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that do not warm up."""


def warm_up_problem(name: str, stage: Mapping[str, Any], steps: int) -> Problem | None:
    """What is wrong with the warm-up of a stage of so many optimizer steps. A share of the steps always leaves one."""
    warm_up = stage.get("warmup_steps", 0)
    if not isinstance(warm_up, (int, float)) or warm_up < max(steps, 1):
        return None
    if stage.get("lr_scheduler_type") in _WITHOUT:
        return None
    plural = "s" if steps > 1 else ""
    return Problem(
        f"`{name}.warmup_steps={warm_up:g}` takes the whole training: it has {steps:,} optimizer step{plural}",
        f"set it below {steps:,}, or give a share of the steps, `{name}.warmup_steps=0.1`",
    )
