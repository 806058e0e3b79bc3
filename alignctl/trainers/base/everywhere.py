"""What the processes of a run agree on: all of them ask together."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest number of all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
