"""The memory of the device that trains: how much a computation needs, how much there is, and whether it ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

USED = 0.9
"""Of a device, the part that is planned with."""


def ran_out(error: BaseException) -> bool:
    """Whether an error is that of a device without memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in ("out of memory", "ALLOC_FAILED"))
    )


def let_go() -> None:
    """Gives back the memory of what nobody holds any more; models are held by circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(device: torch.device, compute: Callable[[], None]) -> int | None:
    """Bytes that the device has given to this process when it has given most; None where there were not enough."""
    let_go()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        compute()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None
    finally:
        let_go()
    return torch.cuda.max_memory_reserved(device)


def room_of(device: torch.device) -> int:
    """Bytes of a device that are planned with: nine tenths of it, less what other processes have."""
    free, total = torch.cuda.mem_get_info(device)
    return int(USED * total) - (total - free - torch.cuda.memory_reserved(device))
