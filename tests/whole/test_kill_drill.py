"""The promise: kill it anywhere, give the same command again, and the result is what it would have been, bit for bit.

Real signals to real runs; at night at random moments too. ALIGNCTL_KILLS says how many moments there are,
of which a night takes a third, and ALIGNCTL_SEED which; every day has its own.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from itertools import cycle, islice
from pathlib import Path

import pytest
from support.files import metrics, outcome
from support.models import TINY
from support.processes import HANG_S, finish, start, wait_until_gone, workers
from support.rewards import REWARDS

pytestmark = [pytest.mark.train, pytest.mark.slow]

KILLS = int(os.environ.get("ALIGNCTL_KILLS", 20))
SEED = os.environ.get("ALIGNCTL_SEED") or time.strftime("%Y-%m-%d")
MODEL = ("data.limit=96", "data.eval_limit=8", "eval.prompts=0", *TINY, "run_dir=run")


def settings(stage: str, steps: int, **given: object) -> tuple[str, ...]:
    """Checkpoints so often that many kills fall into one."""
    every = {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4} | given
    return tuple(f"{stage}.{key}={value}" for key, value in every.items())


FUNCTION = (
    "ppo.reward_model=null", "ppo.normalize_rewards=none", f"ppo.reward_funcs=[{REWARDS}:length]",
    "ppo.missing_eos_penalty=null",
)  # fmt: skip
RUNS = {
    "sft": ("recipe=sft_quickstart", *MODEL, *settings("sft", 24)),
    "sft, two processes": (
        "recipe=sft_quickstart", *MODEL, *settings("sft", 24), "distributed=ddp", "launcher.processes=2",
    ),
    "sft, then dpo": ("recipe=sft_dpo_quickstart", *MODEL, *settings("sft", 8), *settings("dpo", 16)),
    "sft, then kto": ("recipe=sft_kto_quickstart", *MODEL, *settings("sft", 8), *settings("kto", 16)),
    "sft, then reward": ("recipe=sft_rm_quickstart", *MODEL, *settings("sft", 8), *settings("rm", 16)),
    "ppo": (
        "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", *FUNCTION, *MODEL,
        *settings("ppo", 12, response_length=8),
    ),
    "dpo, two processes, ZeRO-2": (
        "recipe=sft_dpo_quickstart", "stages=[dpo]", "dpo.from=null", *MODEL, *settings("dpo", 16),
        "distributed=zero2", "launcher.processes=2",
    ),
}  # fmt: skip
VICTIMS = ("worker", "launcher", "last rank")


def kill(run: subprocess.Popen, folder: Path, victim: str) -> None:
    pids = workers(folder)
    pid = run.pid if victim == "launcher" or not pids else pids[-1 if victim == "last rank" else 0]
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        run.kill()


def outcomes(run: Path) -> dict[str, tuple[str, list]]:
    """Of each finished stage the hash of its weights, and what was logged."""
    return {path.parent.name: outcome(path.parent) for path in sorted(run.glob("*/result.json"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Gives the result of a run that is left alone, and the seconds it took; made once for each."""
    made: dict[str, tuple[dict, float]] = {}

    def make(name: str) -> tuple[dict, float]:
        if name not in made:
            folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
            finish(start(folder, *RUNS[name]))
            made[name] = outcomes(folder / "run"), time.monotonic() - began
        return made[name]

    return make


def drill(count: int) -> list[tuple[str, str, float]]:
    """Runs, whom to kill in each, and when, as a share of the time the whole run takes; drawn anew each day."""
    chance = random.Random(SEED)
    names = list(RUNS)
    chance.shuffle(names)
    return [(name, chance.choice(VICTIMS), chance.uniform(0.3, 1.0)) for name in islice(cycle(names), count)]


@pytest.mark.night
@pytest.mark.spread(3)
@pytest.mark.parametrize(("name", "victim", "when"), drill(KILLS), ids=lambda part: str(part)[:20])
def test_killed_at_a_random_moment_and_started_again(tmp_path, undisturbed, name, victim, when):
    expected, seconds = undisturbed(name)
    run = start(tmp_path, *RUNS[name])
    try:
        run.communicate(timeout=when * seconds)
    except subprocess.TimeoutExpired:
        kill(run, tmp_path, victim)
    run.communicate(timeout=HANG_S)
    wait_until_gone(tmp_path)
    finish(start(tmp_path, *RUNS[name]))
    assert outcomes(tmp_path / "run") == expected, f"seed {SEED}"
    steps = [row["step"] for row in metrics(tmp_path / "run" / list(expected)[-1])]
    assert steps == sorted(set(steps)), "steps twice"


@pytest.mark.spread(2)
def test_killed_inside_every_save(tmp_path, undisturbed):
    """Whenever a checkpoint is being written: killed then, three times in one run."""
    expected, _ = undisturbed("sft")
    folder = tmp_path / "run" / "sft" / "checkpoints"
    inside = 0
    for _ in range(8):
        run = start(tmp_path, *RUNS["sft"])
        deadline = time.monotonic() + HANG_S
        before = {path.name for path in folder.glob("checkpoint-*")}
        while run.poll() is None and time.monotonic() < deadline:
            staged = [path for path in folder.glob(".staging/checkpoint-*/*") if path.parent.name not in before]
            if staged:
                break
        if run.poll() is not None:
            break
        kill(run, tmp_path, "worker")
        inside += any(folder.glob(".staging/checkpoint-*"))
        run.communicate(timeout=HANG_S)
        if inside == 3:
            break
    assert inside == 3, "the drill did not hit a save"
    finish(start(tmp_path, *RUNS["sft"]))
    assert outcomes(tmp_path / "run") == expected
