"""How a rehearsal proves that a stage can be saved: wholly where that takes seconds, else the beginning of each tensor.

Used by rehearsal.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alignctl.trainers.base import beside

_WHOLE = 2**18  # bytes of a tensor that is written wholly


@contextmanager
def only_beginnings() -> Iterator[None]:
    """While this lasts, torch and safetensors write all tensors, and of large ones the first rows: every file, of every
    process, by the way of all of it, in the time of a small one."""
    save, flatten = torch.save, safetensors.torch._flatten_as_ptr

    def save_beginnings(content: Any, *args: Any, **options: Any) -> None:
        save(tree_map(_beginning, content), *args, **options)

    def flatten_beginnings(tensors: dict[str, Tensor], *args: Any) -> Any:
        return flatten({name: _beginning(tensor) for name, tensor in tensors.items()}, *args)

    torch.save, safetensors.torch._flatten_as_ptr = save_beginnings, flatten_beginnings
    written_of, beside.written_of = beside.written_of, lambda tensor: _beginning(written_of(tensor))
    try:
        yield
    finally:
        torch.save, safetensors.torch._flatten_as_ptr = save, flatten
        beside.written_of = written_of


def _beginning(value: Any) -> Any:
    """A copy, because torch would write all that a part of a tensor lies in."""
    if type(value) not in (Tensor, nn.Parameter) or value.nbytes <= _WHOLE or value.dim() == 0:
        return value
    rows = max(1, _WHOLE * len(value) // value.nbytes)
    return value.detach()[:rows].clone()
