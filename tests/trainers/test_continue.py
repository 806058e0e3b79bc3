"""Every method, stopped in mid-training and continued, ends with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import time

import pytest
from safetensors.torch import load_file
from support.daily import of_today
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.many import run_many
from support.methods import METHODS, small_run
from support.rewards import REWARDS

from alignctl.config.trl_fields import config_fields
from alignctl.errors import Stopped
from alignctl.methods.registry import methods

pytestmark = pytest.mark.train


# Where a method keeps other state than with its usual roles.
OTHER = {
    "ppo, shared base": (
        "ppo", f"ppo.reward_funcs=[{REWARDS}:length]", "ppo.normalize_rewards=none", "ppo.sharing=shared_base",
        "peft=lora", "peft.lora_dropout=0.1", "ppo.disable_dropout=false", "ppo.learning_rate=1e-2",
    ),
    "sft, an optimizer in float32 over 16 bits": (
        "sft", "sft.optim=adafactor", "model.dtype=bfloat16", "sft.learning_rate=1e-2",
    ),
}  # fmt: skip
CASES = {name: (name, *row.stateful) for name, row in METHODS.items()} | OTHER

# Settings under which something beside weights and an optimizer's moments goes on from step to step, whatever the
# method: for every one whose trainer takes all of them.
_EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
STATEFUL = {
    "schedule free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-2},
    "schedule free, best": {
        "optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "learning_rate": 1e-1,
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
    },
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": "{patience: 0}"} | _EVALUATED,
    "greedy": {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": "{patience: 1, smooth: true}"} | _EVALUATED,
    "warm-up": {
        "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 4, "lr_scheduler_kwargs": "{num_decay_steps: 1}",
    },
    "noise": {"neftune_noise_alpha": 5.0},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "precomputed": {"precompute_ref_log_probs": True},
    "adafactor": {"optim": "adafactor"},
    "dropout": {"disable_dropout": False},
}  # fmt: skip
DROPOUT = "model.scratch.config.attention_dropout=0.1"


def taken(name: str, settings: dict) -> bool:
    """Whether a method has all of these fields."""
    method = methods()[name]
    return set(settings) <= set(config_fields(method.config_class)) - set(method.owned_fields)


def stateful() -> list:
    """By day one method for each of a third of them, others each day; at night a sixth of the rest."""
    found, rest, day = [], [], int(time.strftime("%j"))
    for place, (label, settings) in enumerate(STATEFUL.items()):
        names = [name for name in METHODS if taken(name, settings)]
        assert names, label
        for number, name in enumerate(names):
            today = number == day // 3 % len(names) and place % 3 == day % 3
            (found if today else rest).append((name, settings, f"{label}-{name}"))
    of_night = [pytest.param(*what, marks=[pytest.mark.night], id=label) for *what, label in of_today(rest, 6)]
    return [pytest.param(*what, id=label) for *what, label in found] + of_night


@pytest.mark.parametrize("case", sorted(CASES))
def test_continued_is_undisturbed(tmp_path, monkeypatch, case):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    name, *more = CASES[case]
    check(tmp_path, METHODS[name].stage, small_run(name, *more, **SETTINGS, rows=64))


@pytest.mark.parametrize(("name", "settings"), stateful())
def test_continued_with_all_its_state(tmp_path, monkeypatch, name, settings):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    check(tmp_path, METHODS[name].stage, small_run(name, DROPOUT, rows=64, **SETTINGS | settings))


@pytest.mark.night
def test_processes_continue_with_a_moving_reference_and_with_averages(tmp_path):
    """Of weights that ZeRO-3 divides, and of those that every process has."""
    reference, averages = STATEFUL["moving reference"], STATEFUL["schedule free"]
    given = {"zero3": reference | {"bf16": "false"}, "ddp": reference | averages}
    jobs = []
    for how, settings in given.items():
        settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": "null"} | settings
        arguments = small_run("dpo", f"distributed={how}", "launcher.processes=2", rows=64, **settings)
        jobs.append({"run_dir": str(tmp_path / how), "arguments": arguments})
        jobs.append(
            {"run_dir": str(tmp_path / f"{how}-again"), "arguments": arguments, "continues": str(tmp_path / how)}
        )
    run_many(tmp_path, jobs, 2)
    for how in given:
        folders = [tmp_path / name / "dpo" for name in (how, f"{how}-again")]
        assert len({weights(folder / "model") for folder in folders}) == 1, how
        losses = [[row["loss"] for row in read(folder / "metrics.jsonl")] for folder in folders]
        assert losses[0] == losses[1], how


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_what_is_finished_with_is_the_average(tmp_path, name):
    """Whether anything is evaluated or saved on the way."""
    stage, settings = METHODS[name].stage, STATEFUL["schedule free"] | {"max_steps": 4}
    plain = run_stages(tmp_path / "plain", *small_run(name, save_strategy="no", **settings))
    looked = {"save_steps": 1} | (_EVALUATED if taken(name, _EVALUATED) else {})
    often = run_stages(tmp_path / "often", *small_run(name, **settings | looked))
    assert weights(plain / stage / "model") == weights(often / stage / "model")
    last = often / stage / "checkpoints" / "checkpoint-4"
    if name == "sft":
        assert weights(last) == weights(often / stage / "model")
        moved = load_file(last / "training_weights.safetensors")
        saved = load_file(last / "model.safetensors")
        assert any((moved[key] != saved[key]).any() for key in saved), "the average is not what was moved"


LOGGED = ("loss", "learning_rate", "eval_loss", "num_tokens")
SETTINGS = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 16}


def check(tmp_path, stage: str, arguments: tuple[str, ...]) -> None:
    """Three runs: undisturbed, stopped, and continued."""
    whole = run_stages(tmp_path / "whole", *arguments) / stage
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        run_stages(tmp_path / "cut", *arguments, signal=StopsAfter(3))
    continued = run_stages(tmp_path / "cut", *arguments) / stage
    assert read(continued / "result.json")["steps"] == 6
    assert weights(continued / "model") == weights(whole / "model")
    results = [read(folder / "result.json") for folder in (continued, whole)]
    assert results[0] == results[1]
    logged = [
        [[row.get(key) for key in LOGGED] for row in read(folder / "metrics.jsonl")] for folder in (continued, whole)
    ]
    assert logged[0] == logged[1]
