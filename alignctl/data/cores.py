"""Goes through rows on all cores of a machine. Torch-free."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features

from alignctl.data.kept import write_rows

_AT_ONCE = 100  # rows
_WORTH_ONE = 2_000  # rows, for which a process is started
_LOOK_EVERY_S = 0.2

Batch = dict[str, list[Any]]


def write_converted(
    folder: Path,
    rows: Dataset,
    convert: Callable[[Batch], Batch],
    features: Features,
    processes: int | None,
    count: Callable[[int], None],
) -> None:
    """Writes rows that are made of others, in their order, into files of a folder.

    Args:
        convert: Turns a batch of columns into others, of as many rows or fewer.
        processes: As many of them; None for one a core, where there are rows enough.
        count: Is told of more rows that are done, as it goes.
    """
    wanted = processes or min(len(os.sched_getaffinity(0)), len(rows) // _WORTH_ONE)
    wanted = max(1, min(wanted, len(rows)))
    bounds = [len(rows) * i // wanted for i in range(wanted + 1)]
    shares = [(folder / f"rows_{i:05}.arrow", bounds[i], bounds[i + 1]) for i in range(wanted)]

    def write(file: Path, first: int, last: int, count: Callable[[int], None]) -> None:
        write_rows(file, features, _batches(rows, first, last, convert, count))

    # The first is done here; a process that failed leaves its share to this one, where what it fails of is seen.
    with _Others(write, shares[1:], count) as others:
        write(*shares[0], others.counted)
        for share in others.failed():
            write(*share, count)


def _batches(
    rows: Dataset, first: int, last: int, convert: Callable[[Batch], Batch], count: Callable[[int], None]
) -> Iterator[Batch]:
    for start in range(first, last, _AT_ONCE):
        end = min(start + _AT_ONCE, last)
        yield convert(rows[start:end])
        count(end - start)


class _Others:
    """Processes that do shares of the work beside this one."""

    def __init__(self, write: Callable[..., None], shares: list[Any], count: Callable[[int], None]):
        context = multiprocessing.get_context("fork")  # what they need is there already, and nothing is sent
        self._count, self._counted = count, 0
        self._done = context.RawArray("q", max(len(shares), 1))
        self._shares = shares
        self._running = [
            context.Process(target=self._run, args=(write, share, place, os.getpid()), daemon=True)
            for place, share in enumerate(shares)
        ]

    def __enter__(self) -> _Others:
        for process in self._running:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running:
            process.kill()
            process.join()

    def counted(self, more: int) -> None:
        """Counts rows that are done here, and with them what the others did since."""
        done = sum(self._done)
        self._count(more + done - self._counted)
        self._counted = done

    def failed(self) -> list[Any]:
        """Waits for all; the shares of those that did not do theirs."""
        while any(process.is_alive() for process in self._running):
            time.sleep(_LOOK_EVERY_S)
            if sum(self._done) > self._counted:
                self.counted(0)
        return [share for share, process in zip(self._shares, self._running, strict=True) if process.exitcode]

    def _run(self, write: Callable[..., None], share: Any, place: int, parent: int) -> None:
        gc.freeze()  # what was imported before is not looked through for garbage, which would copy all of it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # the process that waits for this one decides whether to go on

        def count(more: int) -> None:
            self._done[place] += more
            if os.getppid() != parent:
                os._exit(1)  # nobody waits for it

        write(*share, count)
