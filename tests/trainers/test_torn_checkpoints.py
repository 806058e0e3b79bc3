"""What happens to checkpoints on disk does not change a stage's result: torn ones are named and gone past."""

from __future__ import annotations

import pickle
import shutil

import pytest
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.models import TINY

from alignctl.errors import Stopped
from alignctl.run.checkpoints import DAMAGED, MANIFEST, STAGING, complete_checkpoints, note_part, publish
from alignctl.run.hashed import sync_hashed

pytestmark = pytest.mark.train

SMALL = (
    "recipe=sft_quickstart", "data.limit=64", "data.eval_limit=8", "eval.prompts=0", "sft.logging_steps=1",
    "sft.per_device_train_batch_size=16", "sft.max_steps=6", "sft.save_steps=2", *TINY,
)  # fmt: skip


def steps(stage):
    return [checkpoint.step for checkpoint in complete_checkpoints(stage / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("undisturbed"), *SMALL) / "sft"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped at step 5, with checkpoints of steps 4 and 5."""
    run = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        run_stages(run, *SMALL, signal=StopsAfter(5))
    assert steps(run / "sft") == [4, 5]
    return run


def flip(checkpoint):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def delete(checkpoint):
    (checkpoint / "rng_state.pth").unlink()


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (flip, "the content of optimizer.pt has changed since it was written"),
        (truncate, "model.safetensors has "),
        (delete, "rng_state.pth is missing"),
    ],
)
def test_a_torn_checkpoint_is_named_and_the_one_before_continued(tmp_path, undisturbed, stopped, damage, flaw):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    damage(run / "sft" / "checkpoints" / "checkpoint-5")
    stage = run_stages(run, *SMALL) / "sft"
    (notice,) = [text for text in read(stage / "progress.json")["notices"] if "checkpoint-" in text]
    aside = stage / "checkpoints" / DAMAGED
    assert notice.startswith(f"checkpoint-5 cannot be used and is set aside in {aside}: {flaw}")
    assert (aside / "checkpoint-5" / MANIFEST).exists()
    assert notice.endswith("; training continues from checkpoint-4")
    assert weights(stage / "model") == weights(undisturbed / "model")
    assert steps(stage) == [4, 6]
    assert read(stage / "result.json")["steps"] == 6


def test_without_a_sound_checkpoint_training_starts_anew(tmp_path, undisturbed, stopped):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    flip(run / "sft" / "checkpoints" / "checkpoint-5")
    (run / "sft" / "checkpoints" / "checkpoint-4" / MANIFEST).unlink()
    stage = run_stages(run, *SMALL) / "sft"
    notices = [text for text in read(stage / "progress.json")["notices"] if "checkpoint-" in text]
    assert len(notices) == 2
    assert all(notice.endswith("; training starts from the beginning") for notice in notices)
    assert weights(stage / "model") == weights(undisturbed / "model")


def test_manifest_and_what_is_not_there(undisturbed):
    for checkpoint in complete_checkpoints(undisturbed / "checkpoints"):
        manifest = read(checkpoint.path / MANIFEST)
        assert manifest["kind"] == {"processes": 1, "zero_stage": 0}
        assert manifest["files"].keys() >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert not (checkpoint.path / "training_args.bin").exists()  # a pickle with the Hub's token


# Evaluated and saved at every step; the greatest loss counts as the best, which is an early one.
BEST = (
    *SMALL, "sft.eval_strategy=steps", "sft.eval_steps=1", "sft.save_steps=1", "sft.save_total_limit=1",
    "sft.load_best_model_at_end=true", "sft.greater_is_better=true",
)  # fmt: skip


def test_the_best_is_kept_and_found_again_wherever_the_run_lies(tmp_path):
    whole = run_stages(tmp_path / "whole", *BEST) / "sft"
    losses = {row["step"]: row["eval_loss"] for row in read(whole / "metrics.jsonl") if "eval_loss" in row}
    best = max(losses, key=losses.get)
    assert best < 4, losses  # else this tests nothing
    assert steps(whole) == [best, 6]
    notices = read(whole / "progress.json")["notices"]
    assert f"the model is that of checkpoint-{best}, the best by `loss`" in notices
    assert weights(whole / "model") == weights(whole / "checkpoints" / f"checkpoint-{best}")

    with pytest.raises(Stopped):
        run_stages(tmp_path / "cut", *BEST, signal=StopsAfter(5))
    assert steps(tmp_path / "cut" / "sft") == [best, 5]
    (tmp_path / "cut").rename(tmp_path / "moved")
    continued = run_stages(tmp_path / "moved", *BEST) / "sft"
    assert steps(continued) == [best, 6]
    assert weights(continued / "model") == weights(whole / "model")

    # Killed after training and before the result: the best is saved, not the newest.
    shutil.rmtree(continued / "model")
    (continued / "result.json").unlink()
    again = run_stages(tmp_path / "moved", *BEST) / "sft"
    assert weights(again / "model") == weights(whole / "model")
    assert len(read(again / "metrics.jsonl")) == len(read(continued / "metrics.jsonl"))


def test_without_optimizer_state_nothing_is_continued(tmp_path, undisturbed):
    arguments = (*SMALL, "sft.save_only_model=true")
    with pytest.raises(Stopped):
        run_stages(tmp_path, *arguments, signal=StopsAfter(5))
    stage = run_stages(tmp_path, *arguments) / "sft"
    notices = read(stage / "progress.json")["notices"]
    assert "checkpoints hold the model alone (`save_only_model`): training starts from the beginning" in notices
    assert weights(stage / "model") == weights(undisturbed / "model")


class Runs:
    """Unpickled, leaves a file."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return open, (str(self._file), "w")


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path, stopped):
    """Even with a manifest that fits."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(stopped, run)
    checkpoint = run / "sft" / "checkpoints" / "checkpoint-5"
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Runs(trace)))
    (checkpoint / MANIFEST).unlink()
    (checkpoint.parent / STAGING).mkdir(exist_ok=True)
    staged = checkpoint.rename(checkpoint.parent / STAGING / checkpoint.name)
    files = {file.name: sync_hashed(file) for file in staged.iterdir()}
    note_part(staged, 0, 5, {"processes": 1, "zero_stage": 0}, files)
    assert publish(staged) == checkpoint
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run_stages(run, *SMALL)
    assert not trace.exists()
