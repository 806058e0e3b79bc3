"""Every method, stopped in mid-training and continued, ends with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from support.in_process import NeverStops, read, run_stages

from alignctl.errors import Stopped
from alignctl.methods.registry import methods

pytestmark = pytest.mark.train


class StopsAfter(NeverStops):
    """A signal given during an optimizer step."""

    def __init__(self, step: int) -> None:
        self.waits = False
        self._looks, self._step = 0, step

    @property
    def requested(self) -> bool:
        self._looks += 1
        return self._looks >= self._step


def length(prompts, completions):
    """A reward that a model of random weights gets different amounts of."""
    return [len(completion[0]["content"]) / 10 for completion in completions]


RECIPES = {
    "sft": ("recipe=sft_quickstart", "sft.packing=true"),
    "reward": ("recipe=sft_rm_quickstart", "rm.train_sampling_strategy=group_by_length"),
    "dpo": ("recipe=sft_dpo_quickstart", "dpo.precompute_ref_log_probs=true"),
    "ipo": ("recipe=sft_ipo_quickstart", "peft=dora"),
    "kto": ("recipe=sft_kto_quickstart",),
    "orpo": ("recipe=orpo_quickstart",),
    "ppo": (
        "recipe=rlhf_quickstart",
        "ppo.reward_model=null",
        "ppo.reward_funcs=[alignctl.data.quickstart:reward]",
        "ppo.normalize_rewards=running",
        "ppo.target_kl=1.0",
        "ppo.kl_horizon=100",
        "ppo.response_length=8",
    ),
    "ppo, shared base": (
        "recipe=rlhf_quickstart",
        "ppo.reward_model=null",
        f"ppo.reward_funcs=[{__file__}:length]",
        "ppo.normalize_rewards=none",
        "ppo.roles=shared_base",
        "peft=lora",
        "peft.lora_dropout=0.1",
        "ppo.disable_dropout=false",
        "ppo.learning_rate=1e-2",
        "ppo.response_length=8",
    ),
    "simpo": ("recipe=sft_simpo_quickstart", "peft=lora", "simpo.gradient_accumulation_steps=2"),
}


def test_every_method_is_here():
    assert {name.partition(",")[0] for name in RECIPES} == set(methods())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_continued_is_undisturbed(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    recipe, *more = RECIPES[name]
    stage = "rm" if name == "reward" else name.partition(",")[0]
    arguments = (
        recipe, f"stages=[{stage}]", "data.limit=64", "data.eval_limit=8", "eval.prompts=0", f"{stage}.max_steps=6",
        f"{stage}.per_device_train_batch_size=16", f"{stage}.save_steps=2", f"{stage}.logging_steps=1",
        "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64",
        "model.scratch.vocab_size=400", *(() if stage in ("sft", "orpo") else (f"{stage}.from=null",)),
        *more,
    )  # fmt: skip
    whole = run_stages(tmp_path / "whole", *arguments) / stage
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        run_stages(tmp_path / "cut", *arguments, signal=StopsAfter(3))
    continued = run_stages(tmp_path / "cut", *arguments) / stage
    assert read(continued / "result.json")["steps"] == 6
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (continued, whole))
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    losses = [[row["loss"] for row in read(folder / "metrics.jsonl") if "loss" in row] for folder in (continued, whole)]
    assert losses[0] == losses[1]
