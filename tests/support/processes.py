"""Runs in processes of their own: started, watched, ended.

All waiting here is for something to happen, not for a time: the bound says when to give up on what hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from alignctl.monitor.heartbeat import read_beats
from alignctl.run.paths import StagePaths

HANG_S = 600
"""Seconds after which something hangs: more than ten times what the longest run of the tests takes on a quiet machine,
and less than what a process waits for others that are gone (half an hour)."""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Starts `alignctl train ARGUMENTS` in a folder."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "alignctl", "train", *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def torchrun(processes: int) -> list[str]:
    """What stands before a script that so many processes run together."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []


def run_script(script: str, folder: Path, *arguments: object, processes: int = 1) -> None:
    """Runs a script in processes that work together, and waits for them; they have to end well.

    Args:
        folder: Where they run, and the script is written to.
        arguments: What the script is given.
    """
    file = folder / "script.py"
    # As workers do: while an interpreter ends, threads of torch's that are still at something may bring it down.
    file.write_text(script + "\nimport os\nos._exit(0)\n")
    done = subprocess.run(
        [sys.executable, *torchrun(processes), file, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=HANG_S,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def finish(run: subprocess.Popen, code: int = 0) -> str:
    """Waits for the end of a run, which has to be this one; returns what it said on stderr."""
    try:
        _, err = run.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    assert run.returncode == code, err
    return err


def wait_until(what: Callable[[], object], why: str, run: subprocess.Popen | None = None, every_s: float = 0.02):
    """Waits for something to become true; `why` says what is wrong if it does not, or if the run ends before."""
    deadline = time.monotonic() + HANG_S
    while not what():
        assert run is None or run.poll() is None, f"{why}: the run ended with {run.returncode}: {run.stderr.read()}"
        assert time.monotonic() < deadline, why
        time.sleep(every_s)


def beat(stage: Path, rank: int = 0) -> dict:
    """What a process of a stage said last of what it does; nothing before it starts."""
    return next((one for one in beats(stage) if one["rank"] == rank), {})


def beats(stage: Path) -> list[dict]:
    """What each process of a stage said last."""
    return [one for file in StagePaths(stage).ranks.glob("node_*_beats") for one in read_beats(file)]


def wait_for_step(stage: Path, step: int, run: subprocess.Popen | None = None) -> None:
    """Until a stage has done a step, and goes on training."""

    def there() -> bool:
        now = beat(stage)
        return (now.get("step") or 0) >= step and now.get("doing") == "training"

    wait_until(there, f"{stage} did not reach step {step}", run)


def workers(folder: Path) -> list[int]:
    """Processes that train, or start those that do, for runs in a folder."""
    found = subprocess.run(["pgrep", "-f", f"alignctl.(worker|agent) {folder}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_until_gone(folder: Path) -> None:
    """Until nothing trains in a folder any more."""
    wait_until(lambda: not workers(folder), f"workers train on unseen in {folder}", every_s=0.1)
