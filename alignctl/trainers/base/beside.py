"""Writes the files of a checkpoint beside training.

While a checkpoint is saved, transformers, DeepSpeed, PyTorch and peft hand over what is in each file to `torch.save` or
to safetensors. Here its numbers are copied to the memory of the machine instead, and training goes on; a thread writes
the copies, hashes what it writes, and brings it to disk. The memory of the copies is kept for the next checkpoint: new
memory takes several times as long to copy to. A file for which there is none is written at once.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors.torch
import torch
from safetensors import TensorSpec
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from alignctl.run.disk import shown_bytes
from alignctl.run.hashed import HashedFile, write_hashed
from alignctl.run.memory import free_memory

_SMALL = 2**20  # bytes of a tensor, below which its memory is not kept
_TAKES = 0.9  # of the memory that is free

Write = Callable[[HashedFile], None]


def written_of(tensor: Tensor) -> Tensor:
    """What is written of a tensor: all of it. A rehearsal puts something else in the place of this."""
    return tensor.detach()


class Beside:
    """Does one thing at a time beside training."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._failed: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether it is at something."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Does something, once what it is at is done. Ends with the process, whatever it is at then."""
        self.wait()
        self._thread = Thread(target=self._do, args=(work,), name="beside training", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Raises what the last thing ended with, if it failed."""
        if not self.busy and self._failed is not None:
            raise self._failed

    def wait(self) -> None:
        """Waits for what it is at, and raises what that ends with if it fails."""
        if self._thread is not None:
            self._thread.join()
        self.look()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failed = error


class Copies:
    """Takes the files of a checkpoint, of this process, to write them later."""

    def __init__(self, tell: Callable[[str], None]):
        """`tell` is told where there is too little memory to write later."""
        self._tell, self._told = tell, False
        self._kept: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._taken: list[Tensor] = []
        self._later: dict[Path, Write] = {}
        self._written: dict[Path, dict[str, Any]] = {}

    @contextmanager
    def taking(self, leave_out: Collection[str] = (), state_of: int = 1, weights_of: int = 1) -> Iterator[None]:
        """While this lasts, what torch and safetensors are to write to files is taken.

        Args:
            leave_out: Names of files that are not wanted.
            state_of: Processes of this machine that have torch save something at the same time.
            weights_of: Those that have safetensors save something.
        """
        self._take_back()
        save, flatten, serialize = torch.save, safetensors.torch._flatten_as_ptr, safetensors.torch.serialize_file
        alive: list[Tensor] = []

        def save_later(content: Any, file: Any, *args: Any, **options: Any) -> None:
            if not isinstance(file, (str, os.PathLike)):
                save(content, file, *args, **options)
            elif Path(file).name not in leave_out:
                tensors = [one for one in tree_leaves(content) if isinstance(one, Tensor)]
                fits = self._fits(tensors, state_of)
                # All else is copied as Python does it: objects go on changing, too.
                copies = {id(one): self._copy(written_of(one)) for one in tensors} if fits else {}
                kept = copy.deepcopy(content, copies) if fits else content
                self._add(Path(file), lambda opened: save(kept, opened, *args, **options), later=fits)

        def flatten_copies(tensors: dict[str, Tensor], *args: Any) -> Any:
            alive.clear()
            if not self._fits(tensors.values(), weights_of):
                return flatten(tensors, *args)
            specs = {}
            for name, tensor in tensors.items():
                tensor = written_of(tensor)
                alive.append(self._copy(tensor).flatten().view(torch.uint8))
                kind, place = str(tensor.dtype).removeprefix("torch."), alive[-1].data_ptr()
                specs[name] = TensorSpec(dtype=kind, shape=tensor.shape, data_ptr=place, data_len=tensor.nbytes)
            return specs

        def serialize_later(specs: Mapping[str, Any], file: Any, metadata: Mapping[str, str] | None = None) -> None:
            write = partial(_write_tensors, dict(specs), dict(metadata or {}), [*alive])
            self._add(Path(file), write, later=len(alive) == len(specs))

        torch.save, safetensors.torch._flatten_as_ptr = save_later, flatten_copies
        safetensors.torch.serialize_file = serialize_later
        try:
            yield
        finally:
            torch.save, safetensors.torch._flatten_as_ptr = save, flatten
            safetensors.torch.serialize_file = serialize

    def forget(self, file: Path) -> None:
        """Leaves out a file that was taken."""
        if self._later.pop(file, None) is None:
            file.unlink(missing_ok=True)
            self._written.pop(file, None)

    def write(self) -> dict[Path, dict[str, Any]]:
        """Writes what was taken, and brings it to disk.

        Returns:
            Size and SHA-256 of each file.
        """
        while self._later:
            path = next(iter(self._later))
            self._written[path] = write_hashed(path, self._later.pop(path))
        return self._written

    def let_go(self) -> None:
        """Lets go of the memory of copies, once they are written."""
        self._kept.clear()
        self._later.clear()
        self._taken, self._written = [], {}

    def _take_back(self) -> None:
        """Keeps the memory of the copies that were written last, and lets go of what they had no use for."""
        taken = self._taken
        self.let_go()
        for buffer in taken:
            self._kept[len(buffer)].append(buffer)

    def _add(self, path: Path, write: Write, later: bool) -> None:
        if later:
            self._later[path] = write
        else:
            self._written[path] = write_hashed(path, write)

    @property
    def written(self) -> Collection[Path]:
        """Files that were written at once."""
        return self._written.keys()

    def _fits(self, tensors: Iterable[Tensor], processes: int) -> bool:
        """Whether there is memory for copies, of so many processes of this machine, and some to spare."""
        kept = {size: len(buffers) for size, buffers in self._kept.items()}
        needed = 0
        for size in (written_of(one).nbytes for one in tensors):
            if kept.get(size):
                kept[size] -= 1
            else:
                needed += size
        if needed <= _SMALL:
            return True
        free = free_memory()
        if free is None or needed * processes < _TAKES * free:
            return True
        if not self._told:
            self._told = True
            self._tell(
                f"checkpoints are written while training waits: beside it, copies of {shown_bytes(needed * processes)} "
                f"have to fit into the memory of the machine, which has {shown_bytes(free)} free"
            )
        return False

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes < _SMALL or type(tensor) not in (Tensor, nn.Parameter):
            return tensor.to("cpu", copy=True).contiguous()
        same = self._kept[tensor.nbytes]
        buffer = same.pop() if same else torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._taken.append(buffer)
        return buffer.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _write_tensors(specs: Mapping[str, Any], metadata: Mapping[str, str], alive: Any, file: HashedFile) -> None:
    """Writes a file of safetensors.

    Args:
        specs: Of each tensor type, shape, and where its bytes lie.
        alive: What they lie in.
    """
    # Numbers of many bytes come first, so that each begins at a multiple of its size.
    names = sorted(specs, key=lambda name: (-_bytes_of_a_number(specs[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + specs[name].data_len
        header[name] = {
            "dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if specs[name].data_len:
            file.write((ctypes.c_char * specs[name].data_len).from_address(specs[name].data_ptr))


def _bytes_of_a_number(spec: Any) -> float:
    count = torch.Size(spec.shape).numel()
    return spec.data_len / count if count else 0
