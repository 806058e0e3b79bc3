"""Every step of a warm-up learns, whatever the schedule; training that changes nothing, or ends before, is said."""

from __future__ import annotations

import json

import pytest
import torch
from support.files import read, write_rows
from support.in_process import StopsAfter, run_stages
from support.methods import small_run
from support.small import Small
from transformers import SchedulerType, get_scheduler

from alignctl.errors import RequestError, Stopped

pytestmark = pytest.mark.train

STEPS, RATE = 10, 1e-3
KWARGS = {
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr": 1e-4},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr": 1e-4},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 3},
}
WITHOUT = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def rates_of(optimizer, scheduler) -> list[float]:
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warm_up", [4, 0.35, 0])
@pytest.mark.parametrize("kind", [one for one in SchedulerType if one not in WITHOUT], ids=lambda kind: kind.value)
def test_step_k_of_n_has_k_nths(small, kind, warm_up):
    kwargs = KWARGS.get(kind, {})
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warm_up}
    trainer = small.trainer("sft", learning_rate=RATE, **settings)
    trainer.create_optimizer_and_scheduler(STEPS)
    ours = rates_of(trainer.optimizer, trainer.lr_scheduler)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    steps = 4 if warm_up else 0
    theirs = rates_of(plain, get_scheduler(kind, plain, steps, STEPS, scheduler_specific_kwargs=kwargs))
    expected = [RATE * (step + 1) / steps for step in range(steps)]
    assert ours == pytest.approx(expected + theirs[steps:], rel=1e-9)


@pytest.mark.parametrize("kind", WITHOUT, ids=lambda kind: kind.value)
def test_schedules_without_one_are_as_they_are(small, kind):
    trainer = small.trainer("sft", learning_rate=RATE, warmup_steps=4)
    trainer.args.lr_scheduler_type = kind
    trainer.create_optimizer_and_scheduler(STEPS)
    assert trainer.optimizer.param_groups[0]["lr"] == RATE


def pretrained(shared_data, tmp_path, *more: str) -> tuple[str, ...]:
    """SFT of a pretrained model on 16 rows."""
    texts = [{"text": f"Once upon a time there was a child of {age} years."} for age in range(16)]
    rows = write_rows(tmp_path / "rows.jsonl", texts)
    return (
        "recipe=sft_local", f"model.path={shared_data / 'models/stories260K'}", f"data.path={rows}", "data.eval_rows=0",
        "eval.prompts=0", "sft.max_length=64", "sft.logging_steps=1", "sft.learning_rate=1e-3", *more,
    )  # fmt: skip


def test_one_step_learns(shared_data, tmp_path):
    """With the warm-up that all recipes have."""
    run = run_stages(tmp_path / "run", *pretrained(shared_data, tmp_path, "sft.per_device_train_batch_size=16"))
    (row,) = [row for row in read(run / "sft/metrics.jsonl") if "loss" in row]
    assert row["learning_rate"] == pytest.approx(1e-3)
    assert "changed no weight" not in json.dumps(read(run / "sft/progress.json"))


def test_continued_warm_up_goes_on(tmp_path):
    arguments = small_run("sft", max_steps=6, warmup_steps=4, learning_rate=1e-3)
    with pytest.raises(Stopped):
        run_stages(tmp_path / "run", *arguments, signal=StopsAfter(2))
    run = run_stages(tmp_path / "run", *arguments)
    rates = [row["learning_rate"] for row in read(run / "sft/metrics.jsonl") if "loss" in row]
    # A cosine of what the warm-up leaves: steps 5 and 6 have its first two values.
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 0.5e-3])


def test_ppo_warms_up(tmp_path):
    run = run_stages(tmp_path / "run", *small_run("ppo", rows=32, max_steps=4, warmup_steps=2, learning_rate=1e-3))
    rates = [row["learning_rate"] for row in read(run / "ppo/metrics.jsonl") if "loss" in row]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    "more", [("sft.max_steps=2",), ("sft.num_train_epochs=1",)], ids=["at the check", "once rows are read"]
)
def test_warm_up_of_the_whole_training_is_refused(shared_data, tmp_path, more):
    arguments = pretrained(shared_data, tmp_path, "sft.per_device_train_batch_size=8", "sft.warmup_steps=2", *more)
    with pytest.raises(RequestError, match=r"sft.warmup_steps=2. takes the whole training: it has 2 optimizer steps"):
        run_stages(tmp_path / "run", *arguments)
    assert not (tmp_path / "run/sft/metrics.jsonl").exists()


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_unchanged_weights_are_said(shared_data, tmp_path, adapter):
    arguments = pretrained(shared_data, tmp_path, "sft.learning_rate=1e-50", f"peft={adapter}", "sft.max_steps=2")
    run = run_stages(tmp_path / "run", *arguments)
    notices = read(run / "sft/progress.json")["notices"]
    assert any("steps 1 to 2 changed no weight" in notice and "1e-50" in notice for notice in notices)
