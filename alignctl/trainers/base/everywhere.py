"""What the processes of a run agree on: all of them ask together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

T = TypeVar("T")


def from_all(accelerator: Accelerator, numbers: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers of every process by their names, which are the same in all: float64 `[processes]` each, on the CPU.

    One collective and one wait for the device, however many numbers there are.
    """
    names = sorted(numbers)
    own = torch.tensor([[float(numbers[name]) for name in names]], dtype=torch.float64)
    if accelerator.num_processes > 1 and names:
        own = accelerator.gather(own.to(accelerator.device)).cpu()
    return dict(zip(names, own.unbind(1), strict=True))


def all_objects(own: T, group: ProcessGroup) -> list[T]:
    """What each process of a group has, in their order."""
    found: list[Any] = [None] * group.size()
    distributed.all_gather_object(found, own, group)
    return found
