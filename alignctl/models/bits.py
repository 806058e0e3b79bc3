"""Tensors bit for bit: NaN is the same as NaN, and a sum does not depend on the order it is taken in."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Of the bytes of a tensor, each eight of them as one whole number, modulo 2^64, on the CPU: a tenth of the time
    that it takes with each number by itself."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    together = 8 // bits.element_size()
    if bits.storage_offset() % together:
        bits = bits.clone()  # it has to begin at a multiple of eight bytes
    whole = len(bits) - len(bits) % together
    return (bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64)).cpu()
