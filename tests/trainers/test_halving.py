"""A step for which the memory does not suffice is computed once more in passes of half the size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.methods import METHODS, small_run
from support.rewards import REWARDS
from torch import nn

from alignctl.errors import AlignctlError, Stopped
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.trainers.base.halving import Halving

pytestmark = pytest.mark.train

CASES = {
    "sft": ("sft.pass_tokens=400",),
    "dpo": ("dpo.pass_tokens=400", "peft=lora", "peft.lora_dropout=0.1", "dpo.disable_dropout=false"),
    "ppo": ("ppo.pass_tokens=400", f"ppo.reward_funcs=[{REWARDS}:length]", "ppo.num_mini_batches=2"),
}


class Memory:
    """Runs out once, in a pass of more tokens than fit, where a gradient is wanted."""

    def __init__(self, monkeypatch, fits: int, times: int = 1, after: int = 0):
        self.left, self._fits, self._after = times, fits, after
        embed = nn.Embedding.forward

        def limited(embedding, ids):
            if torch.is_grad_enabled() and ids.numel() > self._fits and embedding.training:
                self._after -= 1
                if self._after < 0 and self.left:
                    self.left -= 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return embed(embedding, ids)

        monkeypatch.setattr(nn.Embedding, "forward", limited)


def arguments(name, *more):
    return small_run(
        name, *CASES[name], "rehearse=false", *more, max_steps=6, save_steps=2, per_device_train_batch_size=4
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_computed_again(tmp_path, monkeypatch, name):
    stage = METHODS[name].stage
    with monkeypatch.context() as patch:
        memory = Memory(patch, fits=40, after=3)
        with pytest.raises(Stopped):
            run_stages(tmp_path / "run", *arguments(name), signal=StopsAfter(5))
    assert memory.left == 0
    [(step, tokens)] = read(tmp_path / "run" / stage / "halved.json").items()
    assert tokens == 200
    assert int(step.partition(".")[0]) <= 5
    said = read(tmp_path / "run" / stage / "progress.json")["notices"]
    assert f"the device's memory did not suffice for step {step}: its passes are of 200 tokens" in said
    # Killed, it goes on from before that step, and computes it in the same passes.
    newest = newest_checkpoint(tmp_path / "run" / stage / "checkpoints")
    run_stages(tmp_path / "run", *arguments(name))
    assert newest is not None
    with monkeypatch.context() as patch:
        Memory(patch, fits=40, after=3)
        run_stages(tmp_path / "straight", *arguments(name))
    assert weights(tmp_path / "run" / stage / "model") == weights(tmp_path / "straight" / stage / "model")


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_not_twice(tmp_path, monkeypatch, name):
    Memory(monkeypatch, fits=20, times=100)
    with pytest.raises(AlignctlError, match=r"no memory left at step 1.*, in passes of at most 200 tokens") as error:
        run_stages(tmp_path / "run", *arguments(name))
    assert "`pass_tokens=100`" in error.value.problems[0].hint
    assert "`activation_checkpointing=true`" in error.value.problems[0].hint


class Trainer:
    """As much of one as is asked."""

    def __init__(self):
        self.args = SimpleNamespace(device=torch.device("cpu"))
        self.accelerator = SimpleNamespace(distributed_type=DistributedType.NO)
        self.model, self.told = nn.Linear(2, 2), []
        self.tell = self.told.append


def fitting(most):
    def passes(tokens):
        if tokens > most:
            raise torch.OutOfMemoryError("out of memory")
        return tokens

    return passes


def test_not_in_every_step(tmp_path):
    halving, trainer = Halving(tmp_path / "halved.json"), Trainer()
    assert halving.compute(trainer, "3", 400, fitting(200)) == 200
    assert halving.compute(trainer, "5", 400, fitting(200)) == 200, "the step between was not"
    with pytest.raises(AlignctlError, match="no memory left at step 6, in passes of at most 400 tokens"):
        halving.compute(trainer, "6", 400, fitting(200))
    assert len(trainer.told) == 2
    # A run that is continued knows it, whatever fits now.
    assert Halving(tmp_path / "halved.json").compute(trainer, "5", 400, fitting(400)) == 200


def test_what_is_given_then_counts(tmp_path):
    """As the error advised: fewer tokens than a step was halved to."""
    halving, trainer = Halving(tmp_path / "halved.json"), Trainer()
    with pytest.raises(AlignctlError) as error:
        halving.compute(trainer, "3", 400, fitting(100))
    assert "`pass_tokens=100`" in error.value.problems[0].hint
    assert Halving(tmp_path / "halved.json").compute(trainer, "3", 100, fitting(100)) == 100


def test_others_wait(tmp_path):
    trainer = Trainer()
    trainer.accelerator.distributed_type = DistributedType.MULTI_CPU
    with pytest.raises(AlignctlError, match="no memory left at step 3"):
        Halving(tmp_path / "halved.json").compute(trainer, "3", 400, fitting(200))
    assert not (tmp_path / "halved.json").exists()
