"""Looks at the shares of a ZeRO checkpoint before DeepSpeed does, which (0.19.8) unpickles whatever they hold.

torch's own loader reads them first, which makes nothing but tensors, plain values and what is listed here: what passes
is no other for pickle.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_NAMED = re.compile(r"GLOBAL ([\w.]*\w)")  # as torch says what it does not take
_LATEST = "latest"  # the file of a checkpoint that says in which of its folders DeepSpeed looks
_STEP = re.compile(r"global_step[0-9]+")  # as DeepSpeed calls that folder


def find_foreign(folder: Path, rank: int, processes: int) -> str | None:
    """The first file of a ZeRO checkpoint that holds other things than DeepSpeed saves, and what; None where there is
    none. It has DeepSpeed look at no place but the one that is looked at here.

    Args:
        rank: Which of so many processes this is: each looks at its part of them.
    """
    latest = folder / _LATEST
    if not os.path.lexists(latest):  # the model alone was saved (`save_only_model`), and DeepSpeed reads nothing
        return None
    step = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if not _STEP.fullmatch(step) or (folder / step).is_symlink():
        return f"{_LATEST}: it names no folder of the checkpoint"
    files = sorted((folder / step).rglob("*.pt"))
    found = ((file, _foreign(file)) for file in files[rank::processes])
    return next((f"{file.relative_to(folder)}: {what}" for file, what in found if what), None)


def _foreign(file: Path) -> str | None:
    """What is not to be unpickled in a file. Tensors are mapped, not read."""
    with torch.serialization.safe_globals(_known()):
        try:
            torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
            named = _NAMED.search(str(error))
            return f"it would load {named[1]}" if named else "it holds other things than tensors and plain values"
    return None


def _known() -> list[Any]:
    """What DeepSpeed saves beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
