"""Which token goes where: sequences that begin alike share what they have in common, and nothing is padded.

The tokens of a forward pass lie in one row. Sequences of a group lie in it as `shared | own of the first | own of the
second | ...`: position ids go on from the shared tokens in each branch, and a token looks at the shared ones of its
group and at its own branch, up to itself. `Layout.where` finds each token of each sequence again. Two sequences may
find the same token: its gradient is then the sum of both. A group of one is a sequence without padding.

The idea is prefix sharing, arXiv:2410.20305. Knows no loss, no trainer and no attention kernel; torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_LEAST_SHARED = 16  # sharing less than a 16th of what follows costs more in attention than it saves


@dataclass(frozen=True)
class Group:
    """Sequences that begin alike, lying one after the other from `start` on."""

    start: int
    shared: int
    """Tokens that all of them begin with."""
    branches: tuple[int, ...]
    """Tokens that each has of its own, after the shared ones."""


@dataclass(frozen=True)
class Spans:
    """The parts of a packed row as sequences that a kernel attends to by themselves: what a group shares, and each of
    its branches, whose keys are the shared tokens and its own. Queries lie in the row one part after the other."""

    query_ends: Tensor
    """`[parts + 1]`, int32: 0, and where each part's queries end."""
    key_ends: Tensor
    """The same of keys."""
    longest_query: int
    longest_key: int
    keys: Tensor | None
    """`[keys]`, of each key its index in the row; None where every token is a key once."""


@dataclass(frozen=True)
class Layout:
    """The tokens of a forward pass, packed into one row or padded to rows of one length."""

    input_ids: Tensor
    """`[rows, length]`"""
    where: Tensor
    """`[sequences, longest]`, of each token of each sequence its index in `input_ids.flatten()`; what lies behind the
    end of a sequence means nothing."""
    position_ids: Tensor | None = None
    """`[1, length]` of a packed row."""
    groups: tuple[Group, ...] = ()
    """Of a packed row."""
    attention_mask: Tensor | None = None
    """`[rows, length]`, 1 for tokens and 0 for padding, of padded rows."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the layers of a model are called with; `layout` reaches the attention."""
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        # A mask of four dimensions is taken as it is, and here for nothing: without any, transformers would make one
        # over the whole row.
        mask = torch.empty(1, 1, 0, 0, device=self.input_ids.device)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": mask,
            "layout": self,
        }

    def lengthened(self, multiple: int) -> Layout:
        """A packed row with tokens behind its end that nobody looks at, so that so many divide its length."""
        more = -self.input_ids.size(1) % multiple
        if not more:
            return self
        ids, positions = (torch.nn.functional.pad(one, (0, more)) for one in (self.input_ids, self.position_ids))
        groups = (*self.groups, Group(self.input_ids.size(1), more, ()))
        return Layout(ids, self.where, positions, groups)

    @cached_property
    def runs(self) -> list[tuple[int, Group]]:
        """Groups, and how many equal ones lie side by side: only sequences that share nothing are put together, those
        of one length."""

        def alike(group: Group) -> tuple[int, int | None]:
            return group.shared, group.start if group.branches else None

        runs = (list(run) for _, run in groupby(self.groups, alike))
        return [(len(run), run[0]) for run in runs]

    @cached_property
    def pieces(self) -> list[tuple[int, int, int]]:
        """What lies in the row from its beginning on, each a sequence of its own or a part of some: where it begins,
        its length, and how many of that length lie side by side."""
        found = []
        for count, group in self.runs:
            if group.shared:
                found.append((group.start, group.shared, count))
            ends = accumulate(group.branches, initial=group.start + group.shared)
            found += [(start, own, 1) for start, own in zip(ends, group.branches, strict=False)]
        return found

    @cached_property
    def block_mask(self) -> BlockMask:
        """What a token of a packed row may look at, for FlexAttention."""
        groups, branches = (torch.tensor(numbers, device=self.input_ids.device) for numbers in self._segments())

        def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_branch = (branches[key] == 0) | (branches[key] == branches[query])
            return (query >= key) & (groups[query] == groups[key]) & same_branch

        length = len(groups)
        # Not compiled, it makes the whole mask first.
        make = _compiled_block_mask() if groups.device.type == "cuda" else create_block_mask
        return make(may_look, None, None, length, length, groups.device)

    @cached_property
    def spans(self) -> Spans:
        """The parts of a packed row, for kernels that take sequences of several lengths."""
        queries, keys, index = [], [], []
        for group in self.groups:
            shared = torch.arange(group.start, group.start + group.shared)
            if group.shared:
                queries.append(group.shared)
                keys.append(group.shared)
                index.append(shared)
            end = group.start + group.shared
            for own in group.branches:
                queries.append(own)
                keys.append(group.shared + own)
                index += [shared, torch.arange(end, end + own)]
                end += own
        device = self.input_ids.device
        query_ends, key_ends = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device) for sizes in (queries, keys)
        )
        gathered = torch.cat(index).to(device) if queries != keys else None
        return Spans(query_ends, key_ends, max(queries), max(keys), gathered)

    def _segments(self) -> tuple[list[int], list[int]]:
        """Group and branch of each token; branch 0 is what a group shares."""
        groups: list[int] = []
        branches: list[int] = []
        for number, group in enumerate(self.groups):
            for branch, length in enumerate((group.shared, *group.branches)):
                groups += [number] * length
                branches += [branch] * length
        return groups, branches


def pack(sequences: Sequence[Tensor], groups: Iterable[Sequence[int]], device: torch.device | None = None) -> Layout:
    """Lays sequences into one row.

    Args:
        sequences: Token ids `[length]` each, on the CPU.
        groups: Numbers of sequences that may begin alike; each sequence in one of them. How much they share is found
            from their tokens.
        device: Where the layout is wanted.
    """
    where = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    laid: list[Group] = []
    end = 0
    for members, shared in _worth_sharing(sequences, groups):
        laid.append(
            Group(end, shared, tuple(len(sequences[i]) - shared for i in members if len(sequences[i]) > shared))
        )
        ids.append(sequences[members[0]][:shared])
        positions.append(torch.arange(shared))
        common = torch.arange(end, end + shared)
        end += shared
        for index in members:
            length = len(sequences[index])
            where[index, :shared] = common
            where[index, shared:length] = torch.arange(end, end + length - shared)
            ids.append(sequences[index][shared:])
            positions.append(torch.arange(shared, length))
            end += length - shared
    return Layout(
        torch.cat(ids)[None].to(device), where.to(device), torch.cat(positions)[None].to(device), groups=tuple(laid)
    )


def pack_rows(input_ids: Tensor, attention_mask: Tensor, blocks: int = 1) -> Layout:
    """Lays a batch that is padded on the right into one row.

    Args:
        input_ids: `[batch, length]`
        attention_mask: `[batch, length]`, 1 for tokens and 0 for padding.
        blocks: The batch is so many blocks of rows of which the first may begin alike, the second, and so on.
    """
    lengths = attention_mask.sum(1).tolist()
    sequences = [row[:length] for row, length in zip(input_ids.cpu(), lengths, strict=True)]
    assert len(sequences) % blocks == 0
    size = len(sequences) // blocks
    groups = [range(first, len(sequences), size) for first in range(size)]
    layout = pack(sequences, groups, input_ids.device)
    short = input_ids.size(1) - layout.where.size(1)  # columns of nothing but padding
    where = torch.nn.functional.pad(layout.where, (0, short))
    return Layout(layout.input_ids, where, layout.position_ids, layout.groups)


def packed_already(input_ids: Tensor, position_ids: Tensor) -> Layout:
    """The layout of a row `[1, length]` of sequences without padding, each of which begins at position 0."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], input_ids.size(1)]
    groups = tuple(Group(start, end - start, ()) for start, end in zip(starts, ends, strict=True))
    where = torch.arange(input_ids.size(1), device=input_ids.device)[None]
    return Layout(input_ids, where, position_ids, groups)


def pad(sequences: Sequence[Tensor], pad_id: int = 0, device: torch.device | None = None) -> Layout:
    """Lays each sequence into a row of its own, padded on the right."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
    where = torch.arange(input_ids.numel()).view(input_ids.shape)
    return Layout(input_ids.to(device), where.to(device), attention_mask=attention_mask.to(device))


def bins(sizes: Sequence[int], budget: int, padded: bool) -> Iterator[list[int]]:
    """Divides items among forward passes, the largest first.

    Args:
        sizes: Of each item, in tokens.
        budget: Tokens of a pass; an item that is larger has one to itself.
        padded: Whether every item takes as much as the largest beside it.

    Yields:
        The numbers of the items of each pass.
    """
    part: list[int] = []
    used = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        cost = sizes[part[0]] if padded and part else sizes[index]
        if part and used + cost > budget:
            yield part
            part, used, cost = [], 0, sizes[index]
        part.append(index)
        used += cost
    if part:
        yield part


def balanced(sizes: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Divides items among as few passes of at most `budget` tokens as `bins` finds, and these evenly.

    Args:
        sizes: Of each item, in tokens; one that is larger than the budget has a pass to itself.
        padded: As for `bins`, whose passes hold items of about one size; those are left as they are.
    """
    parts = list(bins(sizes, budget, padded))
    if padded:
        return parts
    # Largest first, each into the emptiest pass; seldom a pass gets too full so that bins fills without being even.
    even: list[list[int]] = [[] for _ in parts]
    full = [0] * len(parts)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = full.index(min(full))
        even[least].append(index)
        full[least] += sizes[index]
    return even if max(full) <= max(budget, max(sizes)) else parts


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def _worth_sharing(sequences: Sequence[Tensor], groups: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], int]]:
    """Groups with how much they share; where that is next to nothing beside what follows, each sequence by itself."""
    for members in groups:
        shared = _common_length([sequences[index] for index in members])
        if shared * _LEAST_SHARED < min(len(sequences[index]) - shared for index in members):
            yield from (((index,), len(sequences[index])) for index in members)
        else:
            yield members, shared


def _common_length(sequences: Sequence[Tensor]) -> int:
    """How many tokens all sequences begin with; all of its tokens for a single one."""
    length = min(map(len, sequences))
    same = torch.ones(length, dtype=torch.long)
    for other in sequences[1:]:
        same &= sequences[0][:length] == other[:length]
    return int(same.cumprod(0).sum())
