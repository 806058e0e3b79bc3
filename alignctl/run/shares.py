"""Who may continue from a checkpoint: under ZeRO and FSDP2 each process keeps a share of the optimizer's state.
Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.errors import RequestError
from alignctl.run.checkpoints import Checkpoint

_ALIKE = ({1, 2}, {3})
"""Stages of ZeRO whose shares DeepSpeed converts into each other, and for any number of processes."""


def kind_of(processes: int, zero_stage: int, fsdp: bool) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the processes that write it. `zero_stage` is 0 for none."""
    return {"processes": processes, "zero_stage": zero_stage} | ({"fsdp": True} if fsdp else {})


def must_convert(checkpoint: Checkpoint, now: Mapping[str, Any]) -> bool:
    """Whether the shares in a checkpoint have to be converted before these processes continue from it.

    Args:
        now: The processes, as a checkpoint's `kind` tells of those that wrote it.

    Raises:
        RequestError: They cannot be; the state of the optimizer would be lost without a word.
    """
    then = checkpoint.kind
    stages = {then["zero_stage"], now["zero_stage"]}
    if then == now or (by_fsdp(then) == by_fsdp(now) and stages == {0}):
        return False
    if any(stages <= alike for alike in _ALIKE):
        return True
    if by_fsdp(then) or by_fsdp(now):
        name = "fsdp2" if by_fsdp(then) else f"zero{then['zero_stage']}" if then["zero_stage"] else "ddp"
        raise RequestError(
            f"{checkpoint.path} was written by {shares(then)} and cannot be continued from by {shares(now)}",
            "PyTorch and DeepSpeed keep weights and the optimizer's state in forms of their own: give "
            f"`distributed={name}`, with any number of processes, or another `run_dir`",
        )
    same = next((alike for alike in _ALIKE if then["zero_stage"] in alike), None)
    names = " or ".join(f"`distributed=zero{stage}`" for stage in same) if same else "`distributed=ddp`"
    raise RequestError(
        f"{checkpoint.path} was written by {shares(then)} and cannot be continued from by {shares(now)}",
        "what the optimizer keeps can be converted for other numbers of processes, but only between ZeRO stages 1 and "
        f"2: give {names}, with any number of processes, or another `run_dir`",
    )


def by_fsdp(kind: Mapping[str, Any]) -> bool:
    """Whether FSDP2 divided what a checkpoint holds. Those of before it did so say nothing of it."""
    return bool(kind.get("fsdp"))


def shares(kind: Mapping[str, Any]) -> str:
    """Processes and how they share, for people."""
    several = kind["processes"] > 1
    processes = f"{kind['processes']} process{'es' if several else ''}"
    if kind["zero_stage"]:
        return f"{processes} under ZeRO stage {kind['zero_stage']}"
    if by_fsdp(kind):
        return f"{processes} under FSDP2"
    return f"{processes} under DDP" if several else processes
