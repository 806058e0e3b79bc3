"""A step for which the memory does not suffice is computed once more in passes of half the size."""

from __future__ import annotations

import pytest
import torch
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.methods import METHODS, small_run
from support.rewards import REWARDS
from torch import nn

from alignctl.errors import AlignctlError, Stopped
from alignctl.run.checkpoints import newest_checkpoint

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
