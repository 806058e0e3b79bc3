"""Several processes write a checkpoint beside training, each its own part of it, and go on from it as if nothing had
been."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import pytest
from support.cells import job
from support.daily import of_today
from support.files import read
from support.many import RUN_MANY, outcome, run_many

from alignctl.run.checkpoints import MANIFEST, complete_checkpoints

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.night, pytest.mark.spread(2, by_file=True)]

PROCESSES = 2
# DeepSpeed's last: where it has been, FSDP cannot begin.
KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CELLS = of_today([(*what, how) for what in (("dpo", "lora"), ("sft", "none")) for how in KINDS], 3)
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
def folder(tmp_path_factory, shared_data):
    """With the runs of all cells, undisturbed and continued."""
    folder = tmp_path_factory.mktemp("shares")
    (folder / "watched.py").write_text(WATCHED)
    jobs = []
    for name, peft, how in CELLS:
        one = job(folder, shared_data, (name, peft, "auto"), (2, 1, how))
        whole = {"run_dir": str(folder / f"{name}-{peft}-{how}"), "arguments": one["arguments"]}
        jobs += [whole, whole | {"run_dir": whole["run_dir"] + "-again", "continues": whole["run_dir"]}]
    run_many(folder, jobs, PROCESSES, folder / "watched.py")
    return folder


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_each_process_writes_and_reads_its_own(folder, cell):
    run = folder / "-".join(cell)
    opened = defaultdict(set)
    for rank in range(PROCESSES):
        file = folder / f"read_{rank}"
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


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_run_that_is_continued_is_the_same(folder, cell):
    run = str(folder / "-".join(cell))
    (losses, weights), (again, weights_again) = outcome(run), outcome(f"{run}-again")
    assert again == losses
    assert (weights == weights_again).all()
