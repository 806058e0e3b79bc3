"""Computes a step once more, in smaller passes, for which the device's memory did not suffice. The trainers ask it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType

from alignctl.errors import AlignctlError
from alignctl.run.files import read_json, write_json
from alignctl.trainers.base.device import let_go, ran_out

T = TypeVar("T")


class Halving:
    """Steps that were computed in passes of half as many tokens. They are written down before they are, so that a run
    that continues from a checkpoint before such a step computes it the same way."""

    def __init__(self, file: Path):
        self._file = file
        self._halved: dict[str, int] = read_json(file) or {}

    def compute(self, trainer: Any, step: str, tokens: int, passes: Callable[[int], T]) -> T:
        """Computes a step, or a part of one that begins without gradients.

        Args:
            step: Its number, with that of the part behind a point.
            tokens: Most of a pass.
            passes: Computes it in passes of so many tokens.

        Raises:
            AlignctlError: There is not enough memory for half as many either, or there was not for the step before, or
                other processes wait for this one.
        """
        device, known = trainer.args.device, self._halved.get(step, tokens)
        halved, tokens = known < tokens, min(tokens, known)
        state, on_device = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        try:
            return passes(tokens)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            alone = trainer.accelerator.distributed_type == DistributedType.NO
            if halved or not alone or tokens < 2 or self._just_did(step):
                raise out_of_memory(f"at step {step}, in passes of at most {tokens:,} tokens", tokens) from error
        for weight in trainer.model.parameters():
            weight.grad = None
        let_go()
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        self._halved[step] = tokens // 2
        write_json(self._file, self._halved)
        trainer.tell(f"the device's memory did not suffice for step {step}: its passes are of {tokens // 2:,} tokens")
        return self.compute(trainer, step, tokens, passes)

    def _just_did(self, step: str) -> bool:
        """Whether the step before was halved, or a part of this one."""
        now = _number(step)
        return any(other != step and now - 1 <= _number(other) <= now for other in self._halved)


def _number(step: str) -> int:
    return int(step.partition(".")[0])


def out_of_memory(when: str, tokens: int) -> AlignctlError:
    """What to tell people."""
    return AlignctlError(
        f"the device has no memory left {when}",
        f"set the stage's `pass_tokens={max(tokens // 2, 1)}` or `activation_checkpointing=true`, which change no "
        "number; the same command with them continues",
    )
