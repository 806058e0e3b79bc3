"""Runs stages as the first of many processes over torch's fake process group, in which the others are not there, and
counts what it would ask them in each optimizer step, gradients left out.

    python fake_ranks.py JOBS.json PROCESSES

JOBS.json is as scripts/run_many.py takes it. Beside it, JOBS.json.counts has a line for each: {"run_dir": ..., "steps":
the collectives from the beginning of a step to that of the next, by name, of the third and the fourth step; before them
there is more to do}. A run ends there.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import distributed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, LAST = 3, 4  # steps
ROOT = Path(__file__).parents[2]


class Enough(BaseException):
    """All that is counted is."""


class Collectives(TorchDispatchMode):
    """Counts collectives by name and by who asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and "wait" not in name:
            self.seen[f"{name} of {_who()}"] += 1
        return func(*args, **(kwargs or {}))


def _who() -> str:
    """The nearest function of this project, or of what it stands on, that asks."""
    frame = sys._getframe()
    while frame := frame.f_back:
        file = frame.f_code.co_filename
        if any(part in file for part in ("/alignctl/", "/trl/", "/transformers/", "parallel/distributed.py")):
            return f"{Path(file).name}:{frame.f_code.co_name}"
    return "?"


def _not_summed(state, bucket):  # torch does not take annotations that are text
    done = Future()
    done.set_result(bucket.buffer())
    return done


def main(jobs: Path, processes: int) -> None:
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999",
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    from alignctl.monitor.callbacks import ProgressFile

    run = runpy.run_path(str(ROOT / "scripts" / "run_many.py"))["run"]
    wrap = DistributedDataParallel.__init__

    def hooked(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        self.register_comm_hook(None, _not_summed)

    DistributedDataParallel.__init__ = hooked
    collectives, begins = Collectives(), []
    begin = ProgressFile.on_step_begin

    def beginning(self, *args, **kwargs):
        begins.append(collectives.seen.copy())
        if len(begins) > LAST:
            raise Enough
        return begin(self, *args, **kwargs)

    ProgressFile.on_step_begin = beginning
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        begins.clear()
        with collectives, contextlib.suppress(Enough):
            raise ValueError(run(Path(job["run_dir"]), job["arguments"], None))
        steps = [after - before for before, after in zip(begins[FIRST - 1 :], begins[FIRST:], strict=False)]
        with Path(f"{jobs}.counts").open("a", encoding="utf-8") as counts:
            counts.write(json.dumps({"run_dir": job["run_dir"], "steps": steps}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
