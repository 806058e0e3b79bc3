"""A real SLURM for tests, and what they do with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support import models
from support.files import metrics
from support.processes import HANG_S, wait_for_step, wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_test_cluster.sh"


TINY = (
    "recipe=quickstart", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", "log_every=1", "rehearse=false",
    *models.TINY,
    "sft.max_steps=160", "sft.logging_steps=1", "sft.save_steps=20", "sft.per_device_train_batch_size=4",
    "dpo.max_steps=4", "dpo.logging_steps=1", "dpo.save_steps=2", "dpo.per_device_train_batch_size=4",
)  # fmt: skip
ONE = ("launcher=slurm", "launcher.gpus_per_node=null", "launcher.processes=1", "launcher.cpus_per_process=1")


class Cluster:
    """Two nodes, n1 and n2, that go down with this process."""

    def __init__(self, folder: Path, *options: str):
        self.folder = folder
        command = [SCRIPT, "up", *options, folder, str(os.getpid())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
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

    def minutes(self, job: str) -> int:
        """How long a job has run, in whole minutes."""
        hours, minutes, _ = self.facts(job)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def end_jobs(self) -> None:
        self.run("scancel", "--user", str(os.getuid()))
        wait_until(lambda: "idle" in set(self.run("sinfo", "-h", "-o", "%T").split()), "jobs do not end", every_s=0.2)

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


def login_node(cluster: Cluster, folder: Path) -> Callable[..., str]:
    """Runs `alignctl ARGUMENTS` as people do where sbatch works. Returns what it says."""

    def run(*arguments: str, code: int = 0, folder: Path = folder) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "alignctl", *arguments], cwd=folder, capture_output=True, text=True,
            env=cluster.env | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}, timeout=HANG_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def started(tmp_path_factory, *options: str) -> Iterator[Cluster]:
    """A cluster that is gone afterwards, for a fixture."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), *options)
    yield cluster
    cluster.down()


def logged_in(cluster: Cluster, folder: Path) -> Iterator[Callable[..., str]]:
    """See `login_node`; every job of the test is gone afterwards."""
    yield login_node(cluster, folder)
    cluster.end_jobs()


def states(alignctl, run: str) -> dict[str, str]:
    found = json.loads(alignctl("status", run, "--json"))
    return {name: stage["state"] for name, stage in found["stages"].items()} | {"run": found["state"]}


def wait_for_state(alignctl, run: str, wanted: str) -> dict[str, str]:
    now: dict[str, str] = {}

    def there() -> bool:
        now.update(states(alignctl, run))
        assert now["run"] == wanted or now["run"] in ("queued", "running"), alignctl("status", run)
        return now["run"] == wanted

    wait_until(there, f"{run} is not {wanted}", every_s=0.2)
    return now


def wait_for_end(alignctl, run: str, wanted: str) -> None:
    """Until SFT has ended so, and DPO, which waits for it, is cancelled: SLURM takes some seconds for that."""
    wait_for_state(alignctl, run, wanted)
    wait_until(lambda: states(alignctl, run)["dpo"] == "cancelled", "what waits for it is not cancelled", every_s=0.2)
    assert states(alignctl, run) == {"sft": wanted, "dpo": "cancelled", "run": wanted}


def wait_for_more_steps(stage: Path, steps: int) -> None:
    wait_for_step(stage, len(metrics(stage)) + steps)


def job(run: Path, stage: str) -> str:
    return json.loads((run / "status.json").read_text())["stages"][stage]["job"]["id"]
