"""A real SLURM for tests, and what they do with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm_test_cluster.sh"


class Cluster:
    """Two nodes, n1 and n2, that go down with this process."""

    def __init__(self, folder: Path):
        self.folder = folder
        done = subprocess.run([SCRIPT, "up", folder, str(os.getpid())], capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def down(self) -> None:
        subprocess.run([SCRIPT, "down", self.folder], check=True)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def queue(self) -> dict[str, str]:
        """Jobs and their states, those that ended too."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def facts(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def kill_node(self, node: str) -> None:
        """As a power cut: the daemon, and all it started for jobs, at once."""
        pids = [int((self.folder / f"slurmd-{node}.own").read_text())]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                name = (process / "comm").read_text()
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            ours = f"SLURM_CONF={self.env['SLURM_CONF']}".encode() in environment
            if ours and (
                f"SLURMD_NODENAME={node}".encode() in environment
                or (name.startswith("slurmstepd") and f"-{node}".encode() in command + name.encode())
            ):
                pids.append(int(process.name))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """The daemon again, after the power came back."""
        subprocess.run([SCRIPT, "start-node", self.folder, node], check=True)


def wait_until(what: Callable[[], object], timeout_s: float, why: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)
