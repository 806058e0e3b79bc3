"""Checkpoints are written while training goes on, and a kill at any moment of that changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from support import killed
from support.daily import of_today
from support.files import metrics, read, weights
from support.in_process import run_stages

from alignctl.run.checkpoints import complete_checkpoints
from alignctl.trainers.base import beside
from alignctl.trainers.base.beside import Beside, Copies
from alignctl.trainers.base.checkpointing import CompleteCheckpoints

pytestmark = pytest.mark.train


DAY = of_today(list(killed.MOMENTS), 3)
LANES = {"day": DAY, "night": [moment for moment in killed.MOMENTS if moment not in DAY]}


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """Gives a folder with a run for each moment of a lane, killed then and started again, and one left alone."""
    made = {}

    def of(lane):
        if lane not in made:
            folder = made[lane] = tmp_path_factory.mktemp(lane)
            done = subprocess.run(
                [sys.executable, killed.__file__, folder, *LANES[lane]], capture_output=True, text=True, cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
        return made[lane]

    return of


def moments():
    marks = {"day": [], "night": [pytest.mark.night]}
    return [pytest.param(lane, moment, marks=marks[lane], id=moment) for lane in LANES for moment in LANES[lane]]


@pytest.mark.parametrize(("lane", "moment"), moments())
def test_killed_at_each_moment_of_a_save_and_started_again(kills, lane, moment):
    kills = kills(lane)
    found = read(kills / "killed.json")[moment]
    assert found["ended"] == signal.SIGKILL
    old = [] if moment == "an old one has lost its name" else ["checkpoint-3"]
    new = ["checkpoint-6"] if moment in killed.NAMED else []
    assert found["left"] == old + new
    assert found["again"] == 0
    undisturbed, again = kills / "undisturbed" / "sft", kills / moment / "sft"
    assert weights(again / "model") == weights(undisturbed / "model")
    assert [row["loss"] for row in metrics(again)] == [row["loss"] for row in metrics(undisturbed)]
    assert [one.step for one in complete_checkpoints(again / "checkpoints")] == [8]
    assert {path.name for path in (again / "checkpoints").iterdir()} <= {"checkpoint-8", ".staging"}


def content():
    return {"one": torch.randn(700, 500), "half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 4)}


def test_files_are_of_what_was_to_be_saved_whatever_becomes_of_it(tmp_path):
    tensors, copies = content(), Copies(print)
    state = {"tensors": tensors, "list": [tensors["one"][3], 5]}
    expected = json.dumps([one.tolist() for one in (*tensors.values(), state["list"][0])])
    for number in range(2):  # into the memory of the first
        with copies.taking(leave_out=["unwanted"]):
            save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
            save_file(tensors, tmp_path / "forgotten")
            torch.save(state, tmp_path / "state")
            torch.save(state, tmp_path / "unwanted")
        copies.forget(tmp_path / "forgotten")
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.zero_()
        state["list"][1] = 6
        written = copies.write()
        assert {file.name for file in written} == {"file", "state"} == {file.name for file in tmp_path.iterdir()}
        state["list"][1] = 5
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
        found, again = load_file(tmp_path / "file"), torch.load(tmp_path / "state", weights_only=True)
        read_back = [*(found[name] for name in tensors), again["list"][0]]
        assert json.dumps([one.tolist() for one in read_back]) == expected, number
        assert again["list"][1] == 5
        assert all(torch.equal(again["tensors"][name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_those_that_safetensors_writes(tmp_path):
    tensors, copies = {"b": torch.randn(400, 700), "a": torch.randn(3), "c": torch.tensor(1.0)}, Copies(print)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with copies.taking():
        save_file(tensors, tmp_path / "ours", metadata={"format": "pt"})
    copies.write()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_without_memory_for_copies_files_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "free_memory", lambda: 2**20)
    said = []
    tensors, copies = content(), Copies(said.append)
    with copies.taking(state_of=2, weights_of=2):
        save_file(tensors, tmp_path / "file")
        torch.save(tensors, tmp_path / "state")
        assert {file.name for file in tmp_path.iterdir()} == {"file", "state"}
    assert copies.write().keys() == set(tmp_path.iterdir())
    assert all(torch.equal(load_file(tmp_path / "file")[name], tensor) for name, tensor in tensors.items())
    (told,) = said
    assert told.startswith("checkpoints are written while training waits: beside it, copies of 2.8 MB have to ")


def test_training_hardly_stands_still():
    """At most 0.3 s a GiB; to hash it alone takes 0.5 to 1.5. The first time there is no memory for it yet."""
    tensors, copies = {str(number): torch.zeros(2**22) for number in range(8)}, Copies(print)
    for _ in range(2):
        began = time.thread_time()
        with copies.taking():
            save_file(tensors, "/nowhere")
            torch.save(tensors, "/nowhere/either")
        took = time.thread_time() - began
    assert took / (2 * 8 * 2**24 / 2**30) < 0.3


def test_one_thing_at_a_time_and_its_failure_is_told():
    beside, hold, order = Beside(), threading.Event(), []
    beside.start(lambda: (hold.wait(), order.append("first")))
    assert beside.busy
    beside.look()
    hold.set()
    beside.start(lambda: order.append("second"))
    beside.wait()
    assert order == ["first", "second"]

    def fail():
        raise OSError("full")

    beside.start(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            beside.wait()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The next one waits for it, and the end of training does."""
    usual, steps = CompleteCheckpoints._write, []

    def slowly(trainer, staged, step, *args):
        time.sleep(0.5)
        steps.append((step, trainer.state.global_step))
        usual(trainer, staged, step, *args)

    monkeypatch.setattr(CompleteCheckpoints, "_write", slowly)
    stage = run_stages(tmp_path, *killed.ARGUMENTS) / "sft"
    assert steps == [(3, 6), (6, 8), (8, 8)]
    assert [one.step for one in complete_checkpoints(stage / "checkpoints")] == [8]
