"""How much of a device's memory a stage uses: what is tried, what is taken, and that a run that continues takes it too.

No GPU is needed: the memory that passes take is made up, all else is done.
"""

from __future__ import annotations

import pytest
import torch
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.methods import METHODS, small_run
from support.rewards import REWARDS
from torch import nn

from alignctl.errors import AlignctlError, Stopped
from alignctl.trainers.base import fitting
from alignctl.trainers.base.fitting import Way, ways

pytestmark = pytest.mark.train


def test_the_fastest_is_tried_first():
    tried = list(ways(16_000, 700, checkpointing=None))
    kept, again = ([way.pass_tokens for way in tried if way.activation_checkpointing is one] for one in (False, True))
    assert kept == [16_000, 8000, 4096], "smaller passes leave a GPU idle"
    assert again == [16_000, 8000, 4000, 2000, 1000, 700]
    assert tried[: len(kept)] == [Way(size, False) for size in kept]
    assert list(ways(1000, 700, checkpointing=None)) == [
        Way(1000, False), Way(1000, True), Way(700, True),
    ]  # fmt: skip
    assert [way.pass_tokens for way in ways(1000, 400, checkpointing=False)] == [1000, 500, 400]
    assert list(ways(None, 0, checkpointing=None)) == [Way(None, False), Way(None, True)]
    assert list(ways(64, 64, checkpointing=True)) == [Way(64, True)]


GB = 10**9


class Device:
    """One that a pass takes a gigabyte of for each token, and that has so many; tokens are counted in real passes."""

    def __init__(self, monkeypatch, gigabytes: int):
        self._bytes, self.passes = gigabytes * GB, []
        monkeypatch.setattr(fitting, "_can_be_tried", lambda trainer: True)
        monkeypatch.setattr(fitting, "room_of", lambda device: int(0.9 * self._bytes))
        monkeypatch.setattr(fitting, "measured", self._measured)
        monkeypatch.setattr(fitting.Fitting, "look", lambda self, device: setattr(self, "_peak", GB))
        embed = nn.Embedding.forward

        def counting(embedding, ids):
            if torch.is_grad_enabled():
                self.passes.append(ids.numel())
            return embed(embedding, ids)

        monkeypatch.setattr(nn.Embedding, "forward", counting)

    def _measured(self, device, compute):
        self.passes.clear()
        compute()
        needed = max(self.passes) * GB
        return None if needed > self._bytes else needed


def arguments(name, *more, steps=20):
    asked = ("eval.prompts=0", "rehearse=true")
    batch = {} if name == "ppo" else {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    return small_run(name, *asked, *CASES[name], *more, max_steps=steps, logging_steps=5, save_steps=8, **batch)


CASES = {"sft": (), "dpo": ("peft=lora",), "ppo": (f"ppo.reward_funcs=[{REWARDS}:length]",)}
BEGINS = 3  # looks that a signal has in a rehearsal


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("sft", 300), pytest.param("dpo", 300, marks=pytest.mark.night), ("ppo", 150)]
)
def test_what_fits_is_taken_and_kept(tmp_path, monkeypatch, name, gigabytes):
    device, stage = Device(monkeypatch, gigabytes), METHODS[name].stage
    with pytest.raises(Stopped):
        run_stages(tmp_path / "run", *arguments(name), signal=StopsAfter(BEGINS + 9))
    record = read(tmp_path / "run" / stage / "rehearsal.json")
    whole, *smaller = [(one["pass_tokens"], one["activation_checkpointing"]) for one in record["tries"]]
    assert smaller[0] == (whole[0], True), (
        "a pass of the whole step keeps no GPU busy, so it is not divided before that"
    )
    assert [tokens for tokens, _ in smaller] == [whole[0] // 2**times for times in range(len(smaller))]
    fit = [one["needed_bytes"] is not None and one["needed_bytes"] <= one["room_bytes"] for one in record["tries"]]
    assert fit == [False] * len(smaller) + [True]
    assert record["found"] == {"pass_tokens": smaller[-1][0], "activation_checkpointing": True}
    assert max(device.passes) <= record["found"]["pass_tokens"]
    shown = read(tmp_path / "run" / stage / "progress.json")["notices"]
    if name != "ppo":
        assert any(f"at most {record['found']['pass_tokens']:,} tokens each" in one for one in shown)
    # A machine with more room continues as it was begun.
    Device(monkeypatch, 10**6)
    run_stages(tmp_path / "run", *arguments(name))
    straight = Device(monkeypatch, gigabytes) and run_stages(tmp_path / "straight", *arguments(name))
    assert weights(tmp_path / "run" / stage / "model") == weights(straight / stage / "model")
    assert read(tmp_path / "run" / stage / "rehearsal.json") == record


def test_batches_that_stay_together_are_tried_as_they_are(tmp_path, monkeypatch):
    Device(monkeypatch, 10**6)
    sorting = arguments("dpo", "dpo.loss_type=[aot]", "dpo.loss_weights=null")
    run = run_stages(tmp_path / "run", *sorting)
    record = read(run / "dpo" / "rehearsal.json")
    assert record["found"] == {"activation_checkpointing": False}
    Device(monkeypatch, 10)
    with pytest.raises(AlignctlError, match="do not fit .* activations computed again, .* are needed"):
        run_stages(tmp_path / "small", *sorting)


def test_what_is_given_is_not_sought(tmp_path, monkeypatch):
    Device(monkeypatch, 300)
    run = run_stages(tmp_path / "tokens", *arguments("sft", "sft.pass_tokens=90"))
    assert read(run / "sft" / "rehearsal.json")["found"] == {"activation_checkpointing": False}
    run = run_stages(tmp_path / "both", *arguments("sft", "sft.pass_tokens=90", "sft.activation_checkpointing=true"))
    assert read(run / "sft" / "rehearsal.json")["found"] == {}


def test_without_a_rehearsal_there_is_a_fixed_budget(tmp_path):
    run = run_stages(tmp_path / "run", *arguments("sft", "rehearse=false", steps=2))
    assert any("at most 896 tokens each" in one for one in read(run / "sft" / "progress.json")["notices"])


def test_trying_leaves_nothing_behind(small):
    """No gradient, no metric, no token counted."""
    trainer = small.trainer("dpo", max_steps=2, save_strategy="no", logging_steps=1)

    class Looks(fitting.Fitting):
        def find(self, trainer, most, least, compute):
            before = trainer._total_train_tokens
            compute(most)
            assert all(weight.grad is None for weight in trainer.model.parameters())
            assert trainer._metrics["train"] == {}
            assert trainer._total_train_tokens == before
            self.found["looked"] = True

    trainer.fitting = looks = Looks(tokens=True, checkpointing=True)
    trainer.train()
    untried = small.trainer("dpo", max_steps=2, save_strategy="no", logging_steps=1)
    untried.train()
    assert looks.found == {"looked": True}
    assert trainer.state.log_history[1]["loss"] == untried.state.log_history[1]["loss"]
