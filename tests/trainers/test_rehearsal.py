"""A stage does all of itself in small before it begins, and leaves nothing of that behind."""

from __future__ import annotations

import gc
import re
from contextlib import nullcontext

import pytest
import torch
from support.files import read, weights
from support.in_process import NeverStops, StopsAfter, run_stages
from support.methods import small_run
from support.rewards import REWARDS
from transformers import PreTrainedModel

from alignctl.data.quickstart import demonstrations
from alignctl.errors import AlignctlError, LaunchError, Stopped
from alignctl.models import shared_files
from alignctl.run import room
from alignctl.stage import proof, rehearsal
from alignctl.trainers.base import checkpointing

pytestmark = pytest.mark.train

# Stages that hold different things in memory: a model, rows computed beforehand and an adapter, several models.
CASES = {
    "sft": ("sft.eval_strategy=epoch",),
    "dpo": ("dpo.precompute_ref_log_probs=true", "peft=lora"),
    "ppo": (f"ppo.reward_funcs=[{REWARDS}:length]",),
}


def arguments(name, *more):
    """20 steps, the least that are rehearsed."""
    asked = ("eval.prompts=4", "eval.max_new_tokens=8")
    return small_run(name, *asked, *CASES[name], *more, max_steps=20, logging_steps=5, save_steps=10)


def what_came_out(stage):
    """Weights, and all logged numbers that are not times."""
    rows = read(stage / "metrics.jsonl")
    times = ("per_s", "runtime", "step_time")
    logged = [{key: row[key] for key in row if not any(word in key for word in times)} for row in rows]
    return weights(stage / "model"), logged


@pytest.mark.parametrize("name", CASES)
def test_it_leaves_no_trace(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    given = arguments(name)
    without = run_stages(tmp_path / "without", *given, "rehearse=false") / name
    with_it = run_stages(tmp_path / "with", *given, "rehearse=true") / name
    assert what_came_out(with_it) == what_came_out(without)
    results = [read(folder / "result.json") for folder in (with_it, without)]
    seconds = results[0].pop("rehearsal_s")
    assert results[0] == results[1]
    notice = f"rehearsed in {seconds:g} s: 2 steps on the longest rows, measured, saved and loaded back"
    assert notice in read(with_it / "progress.json")["notices"]
    names = [{path.name for path in folder.iterdir()} for folder in (with_it, without)]
    assert names[0] - names[1] == {"rehearsal.json"}


class Models(NeverStops):
    """Counts the models in memory when a step of the stage itself is done."""

    def __init__(self):
        self.waits, self.steps, self.found = False, 0, None

    @property
    def requested(self):
        self.steps += 1
        if self.steps == 5:  # two steps of the rehearsal, and some more
            self.found = sum(issubclass(type(one), PreTrainedModel) for one in gc.get_objects())
        return False


def test_its_models_are_gone(tmp_path):
    given = arguments("sft")
    found = []
    for setting in ("rehearse=true", "rehearse=false"):
        signal = Models()
        run_stages(tmp_path / setting, *given, setting, signal=signal)
        found.append(signal.found)
        gc.collect()
    assert found[0] == found[1]


def test_what_would_fail_late_fails_now(tmp_path):
    """The metric by which the best is chosen is looked for after the first evaluation, here at the end."""
    given = arguments(
        "sft", "sft.eval_strategy=steps", "sft.eval_steps=20", "sft.save_steps=20", "sft.load_best_model_at_end=true",
        "sft.metric_for_best_model=no_such",
    )  # fmt: skip
    with pytest.raises((AlignctlError, KeyError), match="no_such"):
        run_stages(tmp_path, *given, "rehearse=true")
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()
    assert [path.name for path in tmp_path.glob(".rehearsal*")] == []


def test_long_rows_are_the_ones(tmp_path):
    """Too long prompts are none of them: nothing of such a row is trained on."""
    given = arguments("sft", "sft.max_length=64", "sft.learning_rate=1e30", "sft.lr_scheduler_type=constant")
    with pytest.raises(AlignctlError, match="is not finite"):
        run_stages(tmp_path, *given, "rehearse=true")
    (batch,) = read(tmp_path / "sft" / "not_finite.json")["batches"]
    lengths = [len(str(row)) for row in demonstrations("train")[:40]]
    chosen = [lengths[row - 1] for row in batch["rows"]]
    assert min(chosen) >= sorted(lengths)[-17]


def test_a_short_stage_has_none(tmp_path):
    given = arguments("sft", "rehearse=true", "sft.max_steps=19")
    stage = run_stages(tmp_path, *given) / "sft"
    assert "rehearsal_s" not in read(stage / "result.json")


def test_a_continued_run_does_not_rehearse_again(tmp_path):
    given = arguments("sft", "rehearse=true")
    with pytest.raises(Stopped, match="step 5 of 20"):
        run_stages(tmp_path, *given, signal=StopsAfter(9))  # four looks in the rehearsal, whose training ends twice
    first = read(tmp_path / "sft" / "rehearsal.json")
    stage = run_stages(tmp_path, *given) / "sft"
    assert not any("rehearsed" in notice for notice in read(stage / "progress.json")["notices"])
    assert read(stage / "result.json")["rehearsal_s"] == first["seconds"]


def test_a_stop_in_the_rehearsal_leaves_nothing(tmp_path):
    given = arguments("sft", "rehearse=true")
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path, *given, signal=StopsAfter(1))
    assert {path.name for path in (tmp_path / "sft").iterdir()} == {"progress.json", "ranks"}


@pytest.mark.parametrize("name", CASES)
def test_large_tensors_are_saved_in_part(tmp_path, monkeypatch, name):
    """As where a checkpoint would take minutes: all files are written, none is loaded, and nothing of that is left."""
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    given = arguments(name)
    without = run_stages(tmp_path / "without", *given, "rehearse=false") / name
    monkeypatch.setattr(rehearsal, "_LITTLE", 0)
    monkeypatch.setattr(rehearsal, "_SAVING_S", 0)
    monkeypatch.setattr(proof, "_WHOLE", 256)
    sizes = []
    publish = checkpointing.publish

    def published(staged):
        sizes.append({file.name: file.stat().st_size for file in staged.rglob("*") if file.is_file()})
        return publish(staged)

    monkeypatch.setattr(checkpointing, "publish", published)
    with_it = run_stages(tmp_path / "with", *given, "rehearse=true") / name
    assert what_came_out(with_it) == what_came_out(without)
    small, *whole = sizes
    assert small.keys() == whole[0].keys()
    weights_of = next(file for file in small if file.endswith(".safetensors"))
    assert small[weights_of] < whole[0][weights_of] / 2
    assert small["optimizer.pt"] < whole[0]["optimizer.pt"] / 2
    said = read(with_it / "progress.json")["notices"]
    assert any("measured, saved as far as the beginning of each tensor" in one for one in said)
    assert any(one.startswith("a checkpoint is of ") and "and takes about " in one for one in said)
    record = read(with_it / "rehearsal.json")
    assert record["checkpoint_bytes"] > 10_000
    assert record["checkpoint_s"] >= 0


def test_shares_of_a_checkpoint_are_saved_in_part(tmp_path, monkeypatch):
    """As each process writes its own under FSDP2."""
    monkeypatch.setattr(proof, "_WHOLE", 256)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for folder, saving in (("whole", nullcontext()), ("part", proof.only_beginnings())):
        with saving:
            shared_files.save_weights(model, tmp_path / folder)
            shared_files.save_state(model, optimizer, tmp_path / folder)
    sizes = [
        {str(file.relative_to(tmp_path / folder)): file.stat().st_size for file in (tmp_path / folder).rglob("*.s*")}
        for folder in ("whole", "part")
    ]
    assert len(sizes[0]) == 2
    assert sizes[0].keys() == sizes[1].keys()
    assert all(sizes[1][name] < size / 3 for name, size in sizes[0].items())


def test_room_is_looked_at_before(tmp_path, monkeypatch):
    """Not after two steps and a checkpoint."""
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    with pytest.raises(LaunchError, match=r"has 1.0 kB free, and .* are needed: 2 checkpoints of"):
        run_stages(tmp_path, *arguments("sft"), "rehearse=true")
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()
    assert not (tmp_path / "sft" / "rehearsal.json").exists()


def test_how_often_to_save_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_LITTLE", 0)
    monkeypatch.setattr(rehearsal, "seconds_to_write", lambda count, folder: 1000.0)
    stage = run_stages(tmp_path, *arguments("sft", "sft.save_steps=10"), "rehearse=true") / "sft"
    (said,) = [one for one in read(stage / "progress.json")["notices"] if one.startswith("a checkpoint is of ")]
    assert "takes about 17 min beside training, which waits for it every 10 steps: with `sft.save_steps=" in said
    assert re.search(r"=\d{3,}` not$", said)
