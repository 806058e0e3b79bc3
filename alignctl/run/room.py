"""What a stage writes beside its small files, and whether the disk has room for it. Torch-free.

plan/room.py knows the numbers from the shapes of a model, before anything is loaded, and trainers/base/room.py from the
weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignctl.config.stages import StageConfig
from alignctl.errors import LaunchError
from alignctl.run.checkpoints import STAGING, ours
from alignctl.run.disk import free_bytes, shown_bytes

DEEPSPEED_STATE = 12  # bytes a parameter: float32 weights and AdamW's two moments, whatever type it is trained in


@dataclass(frozen=True)
class Writes:
    """What a stage writes, in bytes."""

    checkpoint: int
    """Each: the trained weights, and what the optimizer keeps of them."""
    checkpoints: int
    """Most that are there at a time: a new one is complete before an old one is removed."""
    finished: int
    """The model in the type it is saved in, and the adapter where one is trained, or that alone."""
    conversion: int = 0
    """Most that is there beside a checkpoint of DeepSpeed's while it is converted for other processes: the state in
    pieces and put together, and weights that are tied once more."""

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.finished


def state_bytes(optimizer: str, by_deepspeed: bool, numbers: int, size: int) -> int:
    """What an optimizer keeps. Of AdamW, which most need no more than: two numbers of the weight's type for each
    trained weight.

    Args:
        optimizer: transformers' name of it.
        numbers: Of the trained weights.
        size: Their bytes.
    """
    if by_deepspeed:
        return DEEPSPEED_STATE * numbers
    if "8bit" in optimizer:
        return 2 * numbers
    if optimizer.startswith("schedule_free"):
        return 3 * size  # the weights that training goes on with, too
    return 0 if "adafactor" in optimizer or "sgd" in optimizer else 2 * size


def most_checkpoints(saves: int, keep_last: int | None, keeps_best: bool) -> int:
    """Most checkpoints that are there at a time."""
    return min(saves, keep_last + 1 + keeps_best) if keep_last and keep_last > 0 else saves


def refuse_full_disk(stage: StageConfig, folder: Path, writes: Writes, beside: int = 0) -> None:
    """Refuses what would fill the disk.

    Args:
        folder: Of the stage; what lies in its checkpoints is there already.
        beside: Bytes that are written there, too.

    Raises:
        LaunchError: The disk has less free than is going to be written.
    """
    checkpoints = folder / "checkpoints"
    files = (file for one in (*ours(checkpoints), checkpoints / STAGING) for file in one.rglob("*"))
    there = sum(file.stat().st_size for file in files if file.is_file())
    needed, free = writes.total + beside - there, free_bytes(folder)
    if needed <= free:
        return
    fewer = "" if stage.trainer.get("save_total_limit") == 1 else f"`{stage.name}.save_total_limit=1`, or "
    earlier = f", and {shown_bytes(beside)} for those of the stages before it" if beside else ""
    raise LaunchError(
        f"the disk of {folder} has {shown_bytes(free)} free, and {shown_bytes(needed)} are needed: "
        f"{writes.checkpoints:,} checkpoint{'s' * (writes.checkpoints > 1)} of {shown_bytes(writes.checkpoint)} at a "
        "time, and "
        f"{shown_bytes(writes.finished)} for the finished {'adapter' if stage.leaves_adapter else 'model'}{earlier}",
        f"set {fewer}`{stage.name}.save_only_model=true` (which cannot be continued from), or give another `run_dir`",
    )
