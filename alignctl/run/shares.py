"""Who may continue from a checkpoint: under ZeRO each process keeps a share of the optimizer's state. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.errors import RequestError
from alignctl.run.checkpoints import Checkpoint

_ALIKE = ({1, 2}, {3})
"""Stages of ZeRO whose shares DeepSpeed converts into each other, and for any number of processes."""


def must_convert(checkpoint: Checkpoint, now: Mapping[str, Any]) -> bool:
    """Whether the shares in a checkpoint have to be converted before these processes continue from it.

    Args:
        now: The processes, as a checkpoint's `kind` tells of those that wrote it.

    Raises:
        RequestError: They cannot be; the state of the optimizer would be lost without a word.
    """
    then = checkpoint.kind
    stages = {then["zero_stage"], now["zero_stage"]}
    if stages == {0} or then == now:
        return False
    if any(stages <= alike for alike in _ALIKE):
        return True
    same = next((alike for alike in _ALIKE if then["zero_stage"] in alike), None)
    names = " or ".join(f"`distributed=zero{stage}`" for stage in same) if same else "`distributed=ddp`"
    raise RequestError(
        f"{checkpoint.path} was written by {shares(then)} and cannot be continued from by {shares(now)}",
        "what the optimizer keeps can be converted for other numbers of processes, but only between ZeRO stages 1 and "
        f"2: give {names}, with any number of processes, or another `run_dir`",
    )


def shares(kind: Mapping[str, Any]) -> str:
    """Processes and how they share, for people."""
    stage = f" under ZeRO stage {kind['zero_stage']}" if kind["zero_stage"] else ""
    return f"{kind['processes']} process{'es' if kind['processes'] > 1 else ''}{stage}"
