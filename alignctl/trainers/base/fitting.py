"""Finds, in the first step of a rehearsal, how much of a GPU's memory a stage may use. The trainers ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignctl.engine.forward import most_of_all
from alignctl.errors import AlignctlError
from alignctl.run.disk import shown_bytes
from alignctl.trainers.base.device import USED, measured, room_of
from alignctl.trainers.base.room import state_bytes

LARGEST = 32_768
"""Tokens of the largest pass that is tried: larger ones are no faster."""
_BUSY = 4096  # tokens that keep a GPU busy: smaller passes cost more than computing activations again


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    pass_tokens: int | None
    """Most tokens of a pass; None where each batch is one."""
    activation_checkpointing: bool

    def __str__(self) -> str:
        size = "a batch" if self.pass_tokens is None else f"{self.pass_tokens:,} tokens"
        return f"passes of {size}, activations {'computed again' if self.activation_checkpointing else 'kept'}"


def ways(most: int | None, least: int, checkpointing: bool | None) -> Iterator[Way]:
    """What to try, the fastest first: without checkpointing while passes keep a GPU busy, then with it.

    Args:
        most: Tokens of the largest pass; None where each batch is one.
        least: Tokens of the smallest.
        checkpointing: Where that is settled.
    """
    for again in (False, True) if checkpointing is None else (checkpointing,):
        yield Way(most, again)
        size, end = most or 0, least if again or checkpointing is not None else max(least, _BUSY)
        while size > end:
            size = max(size // 2, end)
            yield Way(size, again)


class Fitting:
    """Finds the largest passes that leave a tenth of the device free, and whether activations can be kept. Processes
    that train together find the same."""

    def __init__(self, tokens: bool, checkpointing: bool):
        """Takes what is to be found; the other is settled."""
        self._tokens, self._checkpointing = tokens, checkpointing
        self._tries: list[dict[str, Any]] = []
        self._peak = self._there = 0  # bytes
        self._way: Way | None = None
        self.found: dict[str, Any] = {}
        """Fields of the stage."""

    def find(self, trainer: Any, most: int | None, least: int, compute: Callable[[int | None], None]) -> None:
        """Tries what there is, and gives the trainer the first that fits, where processes can try by themselves.

        Args:
            most: Tokens of all rows of a step in one pass; None where each batch is one.
            least: Tokens of the longest row.
            compute: Computes the largest pass of a step that is divided so, and its gradients.

        Raises:
            AlignctlError: Nothing fits.
        """
        args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
        if not _can_be_tried(trainer):
            return
        self.look(args.device)
        if most is not None:  # all processes try the same
            most, least = (most_of_all(one, args.device) for one in (most, least))
            most = max(least, min(most, LARGEST)) if self._tokens else args.pass_tokens
            least = least if self._tokens else most
        layers = [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]
        later = _needed_later(trainer, [weight for weight in model.parameters() if weight.requires_grad])
        for way in ways(most, least, None if self._checkpointing else args.activation_checkpointing):
            for layer in layers if self._checkpointing else ():
                layer.gradient_checkpointing = way.activation_checkpointing
            peak, room = measured(args.device, lambda tokens=way.pass_tokens: compute(tokens)), room_of(args.device)
            needed = None if peak is None else peak + later
            self._tries.append(asdict(way) | {"needed_bytes": needed, "room_bytes": room})
            if _everywhere(trainer, needed is not None and needed <= room):
                self._take(args, way)
                return
        if _everywhere(trainer, needed is not None and needed <= room / USED):
            self._take(args, way)
            return
        raise AlignctlError(
            f"the longest rows do not fit into the memory of the device: {way}, and more than {shown_bytes(room)} are "
            "needed",
            "set a lower `max_length`, `peft=lora` or `peft=qlora`, or divide the weights, `distributed=zero3`",
        )

    def look(self, device: torch.device) -> None:
        """Remembers how much of a GPU has been needed."""
        if device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(device))
            self._there = torch.cuda.get_device_properties(device).total_memory

    def said(self) -> str:
        """What a sentence about the rehearsal ends with."""
        if not self._peak:
            return ""
        way = f" with {self._way}" if self._way else ""
        return f"; {shown_bytes(self._peak)} of the {shown_bytes(self._there)} of the GPU are needed{way}"

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        if not self._peak:
            return {}
        return {"found": self.found, "tries": self._tries, "peak_bytes": self._peak, "device_bytes": self._there}

    def _take(self, args: Any, way: Way) -> None:
        self._way = way
        if self._tokens and way.pass_tokens is not None:
            args.pass_tokens = self.found["pass_tokens"] = way.pass_tokens
        if self._checkpointing:
            again = self.found["activation_checkpointing"] = way.activation_checkpointing
            args.activation_checkpointing = args.gradient_checkpointing = again


def _can_be_tried(trainer: Any) -> bool:
    """Whether each process can try a pass for itself: on a GPU, where neither weights nor rows are divided."""
    args = trainer.args
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    together = getattr(trainer, "token_group", None) is not None
    divided = trainer.is_fsdp_enabled or together or (plugin is not None and plugin.zero_stage == 3)
    reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant")  # has a backward pass of its own
    return args.device.type == "cuda" and not divided and not reentrant


def _needed_later(trainer: Any, trained: list[nn.Parameter]) -> int:
    """Bytes that a step needs beside the activations of a pass, and a trial has not: gradients, once more that of the
    largest weight, before it is added, and what the optimizer keeps from its first step on."""
    sizes = [weight.numel() * weight.element_size() for weight in trained]
    gradients = sum(sizes) + max(sizes, default=0)
    if not trainer.is_deepspeed_enabled:
        return gradients + state_bytes(trainer, trained)
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return gradients
    # AdamW's two moments; its float32 weights are there.
    return gradients + 8 * sum(weight.numel() for weight in trained) // trainer.accelerator.num_processes


def try_pass(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """A forward and a backward pass that leave nothing behind, nor call what waits for gradients to be added up.

    Where embeddings are trained, the backward pass is that to what they give, so that gradients of weights, which are
    counted by themselves, are not there at once.
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        value = loss(model.train())
    finally:
        for hook in hooks:
            hook.remove()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(value, [one for one in seen if one.requires_grad] or trained, allow_unused=True)


def _everywhere(trainer: Any, fact: bool) -> bool:
    return bool(trainer.accelerator.gather(torch.tensor([fact], device=trainer.args.device)).all())
