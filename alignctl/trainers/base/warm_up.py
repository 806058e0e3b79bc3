"""Warm-ups in which every step learns: step k of a warm-up of n, counted from 1, has k/n of the learning rate.

transformers' schedules (5.23) count from 0, so that the first step has a learning rate of 0
(https://github.com/huggingface/transformers/issues/34754).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType

Schedule = Callable[[int], float]
"""Share of the learning rate by the number of steps taken."""
_COUNTS_FROM_1 = (SchedulerType.COSINE_WARMUP_WITH_MIN_LR,)


class WarmsUp:
    """Mixin before a transformers Trainer. DeepSpeed's own schedule, where its settings have one, is left alone."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warm_up = self.args.get_warmup_steps(num_training_steps)
        by_steps = isinstance(scheduler, LambdaLR) and self.args.lr_scheduler_type not in _COUNTS_FROM_1
        if is_new and warm_up and by_steps:
            _count_from_1(scheduler, warm_up)
        return scheduler


def _count_from_1(scheduler: LambdaLR, warm_up: int) -> None:
    """Lets a schedule that has not begun count the steps of its warm-up from 1."""
    # A partial has no state of its own, so a checkpoint holds the same as of transformers' own schedule.
    scheduler.lr_lambdas = [functools.partial(_shifted, one, warm_up) for one in scheduler.lr_lambdas]
    rates: list[Any] = []
    for group, rate, share in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * share(0)
        rates.append(group["lr"])
    scheduler._last_lr = rates


def _shifted(schedule: Schedule, warm_up: int, steps: int) -> float:
    """A schedule one step further as long as it warms up."""
    return schedule(steps + 1 if steps < warm_up else steps)
