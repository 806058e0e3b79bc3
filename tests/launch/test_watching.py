"""Which processes count as stuck: real ones, that say what they do and then wait or work. And what looking costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from alignctl.launch import watching
from alignctl.launch.failures import stuck
from alignctl.launch.watching import Workers
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.run.paths import StagePaths
from alignctl.run.process import NODE

SAYS = """
import sys, time
from pathlib import Path
from alignctl.monitor import heartbeat
from alignctl.run.paths import StagePaths
heartbeat._LOOK_EVERY_S = 0.2
folder, doing, then = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if doing != "nothing":
    said = heartbeat.Heartbeat(StagePaths(folder), 0)
    said.beat(doing)
while True:
    if then == "waits":
        time.sleep(60)
    elif then == "spins":
        sum(range(1000))
    elif then == "counts":
        said.count("rows")
        time.sleep(0.1)
    else:
        (folder / "written").write_bytes(bytes(2**21))
        time.sleep(0.1)
"""


STUCK = {
    ("nothing", "waits"): True,
    ("loading model", "waits"): True,
    ("loading model", "writes"): False,
    ("reading data", "counts"): False,
    ("rehearsing: reading data", "spins"): True,
    ("training", "spins"): True,
    ("training", "counts"): False,
    ("saving", "waits"): True,
    ("saving", "spins"): True,
    ("saving", "writes"): False,
}


def test_what_does_not_get_on_is_stuck(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_QUIET_S", 2)
    seen, processes = {}, []
    for number, case in enumerate(STUCK):
        folder = tmp_path / str(number)
        folder.mkdir()
        seen[case] = Workers(StagePaths(folder))
        processes.append(subprocess.Popen([sys.executable, "-c", SAYS, str(folder), *case]))
    until = time.monotonic() + 60
    try:
        began = None
        while time.monotonic() < until and not (began and time.monotonic() > began + 5):
            for workers in seen.values():
                workers.look()
            if began is None and sum(bool(workers.beats()) for workers in seen.values()) == len(STUCK) - 1:
                began = time.monotonic()
            time.sleep(0.1)
        assert {case: workers.stuck(2) for case, workers in seen.items()} == STUCK
        for (doing, _), workers in seen.items():
            assert workers.end_at_once() == doing.endswith(("model", "data"))
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """What a stage on 64 machines with 8 processes each leaves, and its heartbeats; each in training."""
    paths, beats = StagePaths(tmp_path), []
    before = Workers(paths, node=5)
    for rank in range(512):
        monkeypatch.setenv(NODE, str(rank // 8))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 8))
        beats.append(Heartbeat(paths, rank))
        beats[-1].beat("training", 1)
    return before, beats


def look(workers: Workers, times: int, step: int = 0, moving: tuple[Heartbeat, ...] = ()) -> None:
    """As many looks as in so many seconds."""
    for second in range(times):
        for beat in moving:
            beat.beat("training", step + second)
        workers._looked -= 1
        workers.look()


def test_a_machine_of_many_leaves_the_file_system_alone(ranks, tmp_path):
    """One file each, and those of other machines in turns: 515 files were opened every second and 1,544 asked for."""
    workers, _ = ranks
    look(workers, 9)
    assert len(workers._beats) == 512, "all are known"
    calls: Counter[str] = Counter()
    sys.addaudithook(lambda event, args: _count(calls, event, args, str(tmp_path)))
    stat = os.stat
    os.stat = lambda path, **options: (calls.update(["stat"]), stat(path, **options))[1]
    try:
        look(workers, 10)
    finally:
        os.stat = stat
    assert 0 < calls["open"] / 10 + 4 + 1 <= 30  # besides: what is shown, 4 a second, and the run's state
    assert 0 < calls["stat"] / 10 <= 100
    assert len(list((tmp_path / "ranks").iterdir())) == 64


def _count(calls: Counter[str], event: str, args: tuple, folder: str) -> None:
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith(folder):
        calls["open"] += 1


def test_one_that_gets_on_anywhere_keeps_all_from_being_stuck(ranks, tmp_path):
    """A machine's processes wait for one of another machine, and go on waiting once that stands still."""
    workers, beats = ranks
    look(workers, 9)
    look(workers, 40, 2, moving=(beats[300],))
    assert not workers.stuck(10)
    look(workers, 10 + 8)
    assert workers.stuck(10)
    assert 10 <= workers.still_s(300) <= 18.1  # it is looked at every eighth second
    assert workers.still_s(40) >= 58
    logs = StagePaths(tmp_path).logs(1)
    logs.mkdir(parents=True)
    for rank in range(512):
        place = "rewards.py" if rank == 300 else "torch/distributed/distributed_c10d.py"
        (logs / f"rank_{rank}.log").write_text(f'Current thread 0x01:\n  File "{place}", line 7 in f\n')
    said = str(stuck("dpo", workers, [], StagePaths(tmp_path)))
    assert "rank 300 on " in said
    assert "after step 41 did not get on for" in said
    assert "rewards.py" in said


def test_what_one_machine_finds_stuck_is_stuck_for_all(ranks, tmp_path):
    workers, _ = ranks
    look(workers, 2)
    assert not workers.stuck(10)
    StagePaths(tmp_path).stuck.touch()
    assert workers.stuck(10)


def test_children_are_those_of_this_machine(ranks):
    """Another machine may have the same numbers."""
    workers, _ = ranks
    assert workers.children_of(os.getpid()) == [os.getpid()] * 8
