"""Weights without numbers: a model of any size is built, divided and trained on torch's device `meta`, where tensors
have shapes and nothing else.

Token ids, masks and layouts stay real, because what is computed depends on them. Where a weight meets them the outcome
has no numbers either, and what is asked of it (is the loss finite?) is answered with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.fake_collectives import non_functional_collectives
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

_ATEN = torch.ops.aten
_META = torch.device("meta")
_BY_INDEX = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)

_COMPARED = (_ATEN.allclose.default, _ATEN.equal.default)


class Numberless(TorchDispatchMode):
    """While it is entered, an operation with one tensor on `meta` is computed there, whatever is on the CPU beside."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes back as what is done with its share
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        first = next((one for one in tensors if one.is_meta), None)
        if first is None:
            if func is _ATEN._to_copy.default and kwargs.get("device") == _META and not args[0].is_floating_point():
                kwargs = kwargs | {"device": None}  # what is computed depends on it
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:
            return torch.ones((), dtype=first.dtype).item()
        if func in _COMPARED:
            return True
        if func is _ATEN._to_copy.default and _is_cpu(kwargs.get("device")):
            return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if _is_cpu(kwargs.get("device")):
            kwargs = kwargs | {"device": _META}
        if not all(one.is_meta for one in tensors):
            written = _written(func, args)
            if any(not one.is_meta for one in _tensors(written)):
                # Real numbers cannot come of none: those that were there stay.
                return written[0] if func._schema.returns else None
            if func in _BY_INDEX:
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = tree_map(_without_numbers, (args, kwargs))
        if func in non_functional_collectives:
            return _not_sent(func, args)
        return func(*args, **kwargs)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Models with random weights are made without numbers, and may be trained so; FSDP2's buffers have none either."""
    usual = DefaultAllocMixin.allocate, FSDPParamGroup._validate_no_meta_params, PreTrainedModel._from_config.__func__

    def made(cls: Any, *args: Any, **options: Any) -> PreTrainedModel:
        with _META:
            return usual[-1](cls, *args, **options)

    DefaultAllocMixin.allocate = _allocate
    FSDPParamGroup._validate_no_meta_params = lambda group: None  # FSDP wants them filled by now
    PreTrainedModel._from_config = classmethod(made)
    try:
        with Numberless():
            yield
    finally:
        DefaultAllocMixin.allocate, FSDPParamGroup._validate_no_meta_params = usual[:2]
        PreTrainedModel._from_config = classmethod(usual[-1])


def _allocate(_: Any, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=_META)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in arguments; torch's own walk through them takes longer than most operations."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _written(func: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments that an operation changes."""
    pairs = zip(args, func._schema.arguments, strict=False)
    return [one for one, argument in pairs if argument.alias_info is not None and argument.alias_info.is_write]


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _without_numbers(value: Any) -> Any:
    return value.to(_META) if isinstance(value, Tensor) and not value.is_meta else value


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks that have numbers as the positions that they name: how many there are can be seen by these alone."""
    found: list[Tensor | None] = []
    for one in indices:
        is_mask = one is not None and one.dtype == torch.bool and not one.is_meta
        found += list(one.nonzero(as_tuple=True)) if is_mask else [one]
    return found


def _not_sent(func: Any, args: Sequence[Any]) -> Any:
    """What a collective gives back: its tensors as they are, and that it is done."""
    work = torch._C._distributed_c10d.FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)
