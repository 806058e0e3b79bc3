"""Runs a stage once for each of some moments of saving its second checkpoint: killed then, and started again.

Each run is a fork of a process that has imported everything. Writes to `FOLDER/killed.json` how it ended and which
checkpoints there were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignctl.run import checkpoints
from alignctl.run.hashed import HashedFile
from alignctl.trainers.base import beside, checkpointing
from support.in_process import run_stages
from support.models import TINY

ARGUMENTS = (
    "recipe=sft_quickstart", "data.limit=64", "data.eval_limit=8", "eval.prompts=0", "sft.logging_steps=1",
    "sft.per_device_train_batch_size=8", "sft.max_steps=8", "sft.save_steps=3", "sft.save_total_limit=1", *TINY,
)  # fmt: skip
MOMENTS = {
    "copying": (beside.Copies, "_copy"),
    "all is copied": (checkpointing.Beside, "start"),
    "between files": (beside, "write_hashed"),
    "inside a file": (HashedFile, "write"),
    "all is written": (checkpointing, "note_part"),
    "all have written": (checkpointing, "publish"),
    "the manifest is written": (checkpoints, "publish_folder"),
    "it has its name": (shutil, "rmtree"),
    "an old one is going": (checkpointing, "remove_old"),
    "an old one has lost its name": (shutil, "rmtree"),
}
NAMED = ("it has its name", "an old one is going", "an old one has lost its name")
"""Moments at which the second checkpoint is complete."""


def kill_at(moment: str, folder: Path) -> None:
    """Lets this process kill itself at a moment of the second checkpoint."""
    owner, name = MOMENTS[moment]
    usual = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        if here(moment, args, folder):
            if moment == "inside a file":
                usual(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*args, **options)

    setattr(owner, name, call)


def here(moment: str, args: tuple, folder: Path) -> bool:
    if moment == "an old one has lost its name":
        return Path(args[0]) == folder / ".staging" / "checkpoint-3" and Path(args[0]).is_dir()
    if moment in ("it has its name", "an old one is going"):
        return (folder / "checkpoint-6").exists()
    return (folder / "checkpoint-3").exists()


def run_beside(work: Callable[[], None]) -> int:
    """In a process of its own; how that ended."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def main(out: Path, moments: list[str]) -> None:
    found = {}
    run_stages(out / "undisturbed", *ARGUMENTS)
    for moment in moments:
        folder = out / moment / "sft" / "checkpoints"

        def killed(moment: str = moment, folder: Path = folder) -> None:
            kill_at(moment, folder)
            run_stages(out / moment, *ARGUMENTS)

        ended = run_beside(killed)
        left = sorted(path.name for path in folder.glob("checkpoint-*"))
        again = run_beside(lambda moment=moment: run_stages(out / moment, *ARGUMENTS))
        found[moment] = {"ended": ended, "left": left, "again": again}
    (out / "killed.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
