"""Matrices of layers that several processes divide, and compute the same rows with: of the first of two each gives some
columns, of the second each takes those, and what the processes come to is added up. So attention has some of its heads
in each. Knows no loss and no trainer; torch only.

The idea is Megatron-LM's, arXiv:1909.08053, Sec. 3.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def group_of_weights(model: nn.Module) -> ProcessGroup | None:
    """The processes that divide the matrices of a model's layers with this one; None where none do."""
    return getattr(model, "weights_group", None)


def place_among_rows(model: nn.Module) -> tuple[int, int]:
    """How many there are to share rows among, and which of them this process is: those that divide the matrices of a
    model compute the same ones, and count as one."""
    if not distributed.is_initialized():
        return 1, 0
    group = group_of_weights(model)
    together = group.size() if group else 1
    return distributed.get_world_size() // together, distributed.get_rank() // together


def give_columns(linear: nn.Linear, entry: Entry) -> None:
    """Lets a layer give those columns that this process has the weights of."""

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        return F.linear(entry(inputs), _own(self.weight), _own(self.bias))

    entry.takers += 1
    linear.forward = MethodType(forward, linear)


def take_columns(linear: nn.Linear, group: ProcessGroup) -> None:
    """Lets a layer take those columns that this process has, and give what all processes' come to."""

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        found = _Summed.apply(F.linear(inputs, _own(self.weight)), group)
        return found if self.bias is None else found + self.bias

    linear.forward = MethodType(forward, linear)


def look_at_own_heads(module: nn.Module, group: ProcessGroup) -> None:
    """Lets a module that all processes have whole, and each uses for its own heads, have the gradient of all heads."""
    plain = module.forward

    def forward(self: nn.Module, *args: Any) -> Tensor:
        kept = dict(self._parameters)
        self._parameters.update({name: _Entered.apply(weight, group) for name, weight in kept.items()})
        try:
            return plain(*args)
        finally:
            self._parameters.update(kept)

    module.forward = MethodType(forward, module)


class Entry:
    """What several layers take alike, as queries, keys and values do: its gradient is added up once for all of them."""

    def __init__(self, group: ProcessGroup):
        self.takers = 0
        """Layers that take it, one after another."""
        self._group = group
        self._given: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._given is None or self._given[0] is not inputs:
            self._given, self._left = (inputs, _Entered.apply(inputs, self._group)), self.takers
        entered, self._left = self._given[1], self._left - 1
        if not self._left:
            self._given = None
        return entered


class _Entered(torch.autograd.Function):
    """The same everywhere; its gradient is the sum of those of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum of what all processes have; each has the gradient of it, which is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(tensor: Tensor, group: ProcessGroup) -> Tensor:
    whole = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(whole, group=group)
    return whole


def _own(weight: Tensor | None) -> Tensor | None:
    """The part of a weight that this process has."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
