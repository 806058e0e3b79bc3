"""Random numbers of completions: each has a stream of its own, so that what is drawn for it depends neither on what is
drawn beside it nor on which process draws it, or on what device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """The seed of a stream, from whatever sets it apart: streams of neighbouring numbers have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


def shares(seeds: Sequence[int], length: int, device: torch.device) -> Tensor:
    """Random numbers in [0, 1), `[completions, length]`, one for each token that is drawn."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    numbers = torch.stack([torch.rand(length, generator=stream, dtype=torch.float64) for stream in streams])
    return numbers.to(device, torch.float32 if device.type == "mps" else torch.float64)


def choose(probs: Tensor, share: Tensor) -> Tensor:
    """Tokens `[rows]` drawn from chances `[rows, vocabulary]`: of each row the first up to which the chances add up to
    more than a share `[rows]` of all."""
    added = probs.to(share.dtype).cumsum(-1)
    wanted = share[:, None] * added[:, -1:]
    return torch.searchsorted(added, wanted, right=True).squeeze(-1).clamp(max=probs.size(-1) - 1)
