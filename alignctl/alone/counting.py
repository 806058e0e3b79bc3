"""Counts what a process sends to others and gets from them, at torch's dispatcher."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS, WEIGHTS, ACTIVATIONS, ROWS = "gradients", "weights", "activations", "rows"
SMALL, ENGINES = "small", "small of the engine"
"""Small are what alignctl asks of processes; so does what divides a model, for norms of gradients for instance."""
_FROM = 4096  # bytes of a collective of which one cannot tell by its name whether it is of numbers alone
_REDUCE_SHARES = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
_GATHER_SHARES = ("_allgather_base_", "allgather_into_tensor_coalesced_")
_REDUCE = ("allreduce_", "allreduce_coalesced_", "reduce_")
_EXCHANGE = ("alltoall_base_", "alltoall_")
_OURS, _PASSED_ON = "alignctl.", ("torch.", "accelerate.", __name__)
_ENGINES = ("torch.nn.parallel.", "torch.distributed.fsdp.", "torch.distributed.tensor.", "deepspeed.")
_PLACES = ("c10d", "_c10d_functional")
_NOT_SENT = ("wait", "wrap", "barrier")  # parts of names


class Collectives(TorchDispatchMode):
    """While it is entered, counts collectives by kind, with the bytes of the larger side of each."""

    def __init__(self, tp_size: int = 1, sp_size: int = 1) -> None:
        """How many processes divide matrices of layers, and how many the tokens of rows: they send activations."""
        super().__init__()
        self._tp_size, self._sp_size = tp_size, sp_size
        together = (ACTIVATIONS, ROWS) if max(tp_size, sp_size) > 1 else ()
        self._kinds = (GRADIENTS, WEIGHTS, *together, SMALL, ENGINES)
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, kind: str, size: int) -> None:
        """Counts one that torch does not dispatch."""
        self.count[kind] += 1
        self.bytes[kind] += size

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {kind: {"count": self.count[kind], "bytes": self.bytes[kind]} for kind in self._kinds}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes back as what is done with its share
        name = func.overloadpacket.__name__
        if func.namespace in _PLACES and not any(part in name for part in _NOT_SENT):
            size = max((one.numel() * one.element_size() for one in _tensors(args)), default=0)
            activations = size >= _FROM and self._is_of_activations(name, args)
            self.add(ACTIVATIONS if activations else _kind(name, size), size)
        return func(*args, **kwargs or {})

    def _is_of_activations(self, name: str, args: Any) -> bool:
        if self._tp_size > 1:
            return name in _REDUCE
        return self._sp_size > 1 and (name in _EXCHANGE or _processes_of(args) == self._sp_size)


def _kind(name: str, size: int) -> str:
    if name in _REDUCE_SHARES or (name in _REDUCE and size >= _FROM):
        return GRADIENTS
    if name in _GATHER_SHARES or (name == "broadcast_" and size >= _FROM):
        return WEIGHTS
    return SMALL if _asked_by().startswith(_OURS) else ENGINES


def _asked_by() -> str:
    """The module that asks for the collective at hand: the nearest but for what passes it on."""
    frame = sys._getframe()
    while frame := frame.f_back:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_ENGINES) or not module.startswith(_PASSED_ON):
            return module
    return ""


def _processes_of(args: Any) -> int | None:
    """How many take part."""
    groups = (one for one in args if isinstance(one, torch.ScriptObject))
    return next((ProcessGroup.unbox(one).size() for one in groups if "ProcessGroup" in str(one._type())), None)


def _tensors(args: Any) -> list[Tensor]:
    return [one for one in tree_leaves(args) if isinstance(one, Tensor)]


def count_gradients_of(model: DistributedDataParallel, collectives: Collectives) -> None:
    """Counts the gradients that DDP adds up, past the dispatcher; nothing is added up then."""

    def added(_, bucket):  # torch would look at annotations, which are text here
        collectives.add(GRADIENTS, bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, added)
