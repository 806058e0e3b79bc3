"""Several processes write a checkpoint beside training, each its own part of it, and go on from it as if nothing had
been."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import pytest
from support.cells import job
from support.files import read
from support.many import RUN_MANY, outcome, run_many

from alignctl.run.checkpoints import MANIFEST, complete_checkpoints

pytestmark = [pytest.mark.train, pytest.mark.slow]

PROCESSES = 2
# DeepSpeed's last: where it has been, FSDP cannot begin.
DAY = [("sft", "none", "fsdp2"), ("sft", "none", "zero3")]
KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
NIGHT = [(*what, how) for how in KINDS for what in (("dpo", "lora"), ("sft", "none")) if (*what, how) not in DAY]
LANES = {"day": DAY, "night": NIGHT}
WATCHED = f"""
import os
import runpy
import sys

def note(event, found):
    if event == "open" and isinstance(found[0], str) and "/.staging/checkpoint-" in found[0]:
        path, mode, flags = found
        reads = "r" in mode if mode else flags & 3 == os.O_RDONLY
        if reads and os.path.isfile(path):
            with open("read_" + os.environ["RANK"], "a") as file:
                print(path, file=file)

sys.addaudithook(note)
runpy.run_path({str(RUN_MANY)!r}, run_name="__main__")
"""
"""Notes what each process reads of what is staged."""


@pytest.fixture(scope="module")
def lanes(tmp_path_factory, shared_data):
    """Gives the folder of a lane, with the runs of its cells, undisturbed and continued."""
    made: dict[str, Path] = {}

    def of(lane: str) -> Path:
        if lane not in made:
            folder = made[lane] = tmp_path_factory.mktemp(lane)
            (folder / "watched.py").write_text(WATCHED)
            jobs = []
            for name, peft, how in LANES[lane]:
                one = job(folder, shared_data, (name, peft, "auto"), (2, 1, how))
                whole = {"run_dir": str(folder / f"{name}-{peft}-{how}"), "arguments": one["arguments"]}
                jobs += [whole, whole | {"run_dir": whole["run_dir"] + "-again", "continues": whole["run_dir"]}]
            run_many(folder, jobs, PROCESSES, folder / "watched.py")
        return made[lane]

    return of


def cells() -> list:
    marks = {"day": [], "night": [pytest.mark.night]}
    return [pytest.param(lane, cell, marks=marks[lane], id="-".join(cell)) for lane in LANES for cell in LANES[lane]]


@pytest.mark.parametrize(("lane", "cell"), cells())
def test_each_process_writes_and_reads_its_own(lanes, lane, cell):
    run = lanes(lane) / "-".join(cell)
    opened = defaultdict(set)
    for rank in range(PROCESSES):
        file = lanes(lane) / f"read_{rank}"
        for line in file.read_text().splitlines() if file.exists() else ():
            opened[rank].add(line.replace("/.staging", ""))
    checkpoints = complete_checkpoints(run / "cell" / "checkpoints")
    assert [one.step for one in checkpoints] == [2, 4]
    for checkpoint in checkpoints:
        files = read(checkpoint.path / MANIFEST)["files"]
        there = {file.relative_to(checkpoint.path).as_posix() for file in checkpoint.path.rglob("*") if file.is_file()}
        assert files.keys() == there - {MANIFEST}
        assert read(checkpoint.path / "trainer_state.json")["log_history"] == []
        for name, file in files.items():
            assert hashlib.sha256((checkpoint.path / name).read_bytes()).hexdigest() == file["sha256"], name
            for rank in range(PROCESSES):
                assert rank == file["rank"] or str(checkpoint.path / name) not in opened[rank], (name, rank)
        large = {file["rank"] for name, file in files.items() if file["bytes"] > 100_000}
        assert large == ({0} if cell[-1] == "ddp" else {0, 1})


@pytest.mark.parametrize(("lane", "cell"), cells())
def test_a_run_that_is_continued_is_the_same(lanes, lane, cell):
    run = str(lanes(lane) / "-".join(cell))
    (losses, weights), (again, weights_again) = outcome(run), outcome(f"{run}-again")
    assert again == losses
    assert (weights == weights_again).all()
