"""Runs of several processes through the command: stopped, killed, failed and stuck ones, and what is said of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.files import outcome
from support.models import TINY
from support.processes import HANG_S, beat, finish, start, wait_for_step, wait_until, wait_until_gone, workers

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.spread(3)]

SMALL = (
    "recipe=quickstart", "stages=[sft]", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", "log_every=1",
    *TINY,
    "sft.num_train_epochs=8", "sft.logging_steps=1", "sft.save_steps=5", "sft.per_device_train_batch_size=8",
    "sft.weight_decay=5", "launcher.processes=2", "run_dir=run",
)  # fmt: skip
STEPS = 48


@pytest.fixture(scope="module", params=["zero3"])
def undisturbed(request, tmp_path_factory):
    """How several processes work together, and the result of a run that was left alone."""
    folder = tmp_path_factory.mktemp(request.param)
    finish(start(folder, *SMALL, f"distributed={request.param}"))
    return f"distributed={request.param}", outcome(folder / "run" / "sft")


def test_all_ranks_stop_at_one_step_and_continue_as_if_nothing_had_been(tmp_path, undisturbed):
    """Asked by SIGTERM to the command, then by SIGUSR1 to one rank alone; then the command is killed, and a rank."""
    how, expected = undisturbed
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, 7, run)
    run.send_signal(signal.SIGTERM)
    err = finish(run, 75)
    saved = int(re.search(r"stopped: stage `sft`, step (\d+) is saved\nhint: run the same command again", err).group(1))
    assert 7 <= saved < STEPS
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 3, run)
    os.kill(beat(stage, 1)["pid"], signal.SIGUSR1)
    err = finish(run, 75)
    assert f"continues after step {saved}" in err

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 8, run)
    os.kill(beat(stage, 1)["pid"], signal.SIGKILL)
    err = finish(run, 1)
    assert re.search(r"stage `sft`: rank 1 on \S+ after step \d+ was killed by signal 9", err)
    assert "Traceback" not in err
    wait_until_gone(tmp_path)

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 12, run)
    run.kill()
    run.wait(HANG_S)
    wait_until_gone(tmp_path)

    finish(start(tmp_path, *SMALL, how))
    assert outcome(stage) == expected


PPO = (
    "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", "ppo.normalize_rewards=none",
    "ppo.reward_funcs=[rewards.py:reward]", "data.limit=64", "data.eval_limit=8", "eval.prompts=0",
    *TINY,
    "ppo.max_steps=8", "ppo.response_length=4", "ppo.per_device_train_batch_size=4", "log_every=1",
    "distributed=ddp", "launcher.processes=2", "run_dir=run",
)  # fmt: skip
ON_RANK_1 = """
import os, time

calls = 0

def reward(prompts, completions):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        {what}
    return [float(len(str(completion)) % 7) for completion in completions]
"""


def test_the_error_of_a_rank_is_shown_and_not_what_follows_from_it(tmp_path):
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what="raise KeyError('nobody home')"))
    err = finish(start(tmp_path, *PPO), 1)
    assert "the reward function `reward` raised KeyError: 'nobody home'" in " ".join(err.split())
    assert err.count("error:") == 1
    assert len(err.splitlines()) < 70
    wait_until_gone(tmp_path)


def test_the_error_of_a_rank_is_shown_though_another_does_not_even_end(tmp_path):
    """Which torchrun then kills: what it killed is not to blame."""
    what = "raise KeyError('nobody home')\n    if calls == 3:\n        [time.sleep(9) for _ in range(400)]"
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what=what))
    run = start(tmp_path, *PPO)
    error = tmp_path / "run" / "ppo" / "ranks" / "rank_1_error.json"
    wait_until(error.exists, "rank 1 does not fail", run)
    err = finish(run, 1)
    assert "KeyError: 'nobody home'" in err
    wait_until_gone(tmp_path)


def test_a_stuck_rank_is_named_with_what_it_was_doing(tmp_path):
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what="time.sleep(3600)"))
    err = finish(start(tmp_path, *PPO, "launcher.stall_timeout=10"), 1)
    assert re.search(r"rank 1 on \S+ after step 2 did not get on for [12]\d s \(training, .*\)", err)
    assert re.search(r'File "\S+rewards.py", line \d+ in score', err), "where it was stuck"
    wait_until_gone(tmp_path)


def test_a_rank_that_is_stopped_is_named(tmp_path):
    """It cannot say where it is; the others wait for it, and say so."""
    run = start(tmp_path, *SMALL, "distributed=ddp", "launcher.stall_timeout=10")
    wait_for_step(tmp_path / "run" / "sft", 5, run)
    os.kill(beat(tmp_path / "run" / "sft", 0)["pid"], signal.SIGSTOP)
    err = finish(run, 1)
    assert re.search(
        r"rank 0 on \S+ after step \d+ did not get on for [12]\d s .*, so .* it did not answer where it was", err
    )
    wait_until_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_every_process_at_once_is_one_request(tmp_path, number):
    """As schedulers send it: to the command, to torchrun, to the workers."""
    run = start(tmp_path, *SMALL, "distributed=ddp")
    wait_for_step(tmp_path / "run" / "sft", 5, run)
    for pid in [run.pid, *workers(tmp_path)]:
        os.kill(pid, number)
    err = finish(run, 75)
    assert "is saved\nhint: run the same command again" in err
    wait_until_gone(tmp_path)


def test_torchrun_alone_cannot_be_asked_to_stop(tmp_path):
    run = start(tmp_path, *SMALL, "distributed=ddp", "sft.num_train_epochs=2")
    wait_for_step(tmp_path / "run" / "sft", 3, run)
    (agent,) = (pid for pid in workers(tmp_path) if b"alignctl.agent" in Path(f"/proc/{pid}/cmdline").read_bytes())
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(agent, number)
    finish(run)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launcher.processes=2"], "`launcher` asks for 2 processes, and `distributed` is none"),
        (["distributed=zero2"], "`distributed=zero2` needs to know how many processes there are"),
        (["distributed=ddp", "launcher.processes=2", "distributed.config.zero_optimization.stage=1"], "no effect"),
        (["distributed=zero2", "launcher.processes=2", "distributed.config.optimizer.type=Adam"], "`optim`"),
        (
            ["distributed=zero2", "launcher.processes=2", "distributed.config.zero_optimization.reduce_bucket_sice=1"],
            "did you mean `distributed.config.zero_optimization.reduce_bucket_size`",
        ),
        (
            ["distributed=zero2", "launcher.processes=2", "distributed.config.zero_optimization.overlap_com=true"],
            "unknown key",
        ),
        (["distributed=ddp", "launcher.nodes=2", "launcher.gpus_per_node=2"], "launcher.rdzv_endpoint=HOST:29500"),
        (["distributed=zero3", "launcher.processes=2", "peft=qlora"], "set `distributed=zero2`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_launched_is_refused(alignctl, arguments, expected):
    done = alignctl("train", "recipe=quickstart", *arguments, "--dry-run")
    assert done.code == 2
    assert expected in done.err


def test_a_run_continues_on_other_processes_where_that_loses_nothing(tmp_path, alignctl, undisturbed):
    """The global batch is the same in all of them, as it follows or as it is given, so it is one run, with the losses
    of one that was left alone."""
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SMALL, "distributed=zero2")
    wait_for_step(stage, 6, run)
    run.send_signal(signal.SIGTERM)
    finish(run, 75)
    alone = [word for word in SMALL if not word.startswith(("launcher", "sft.per_device"))]
    refused = alignctl("train", *alone, "sft.per_device_train_batch_size=16", folder=tmp_path)
    assert refused.code == 2
    assert "was written by 2 processes under ZeRO stage 2 and cannot be continued from by 1 process\n" in refused.err

    again = tmp_path / "again"
    again.mkdir()
    given = "sft.global_batch_size=16"
    run = start(again, *SMALL, "distributed=ddp", given)
    wait_for_step(again / "run" / "sft", 6, run)
    run.send_signal(signal.SIGTERM)
    finish(run, 75)
    err = finish(start(again, *alone, "sft.per_device_train_batch_size=4", given))
    assert "continues after step" in err
    rows, expected = outcome(again / "run" / "sft")[1], undisturbed[1][1]
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert [row[1:] for row in rows] == [pytest.approx(row[1:], abs=2e-5) for row in expected]


@pytest.mark.parametrize(("how", "processes"), [("zero2", 1), ("zero3", 1)])
def test_a_run_under_zero_continues_on_other_processes(tmp_path, undisturbed, how, processes):
    """With the loss curve of a run that was left alone, whose stage of ZeRO changes nothing but the rounding; and the
    checkpoint it continues from stays what it was."""
    stage, how = tmp_path / "run" / "sft", (f"distributed={how}", "sft.save_total_limit=20")
    run = start(tmp_path, *SMALL, *how)
    wait_for_step(stage, 7, run)
    run.send_signal(signal.SIGTERM)
    finish(run, 75)
    *_, newest = sorted(stage.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    before = {file: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
    # In float32: the weights, and what the optimizer keeps, which is the weights it steps from and two moments.
    weights = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    assert (
        sum(len(content) for file, content in before.items() if file.suffix in (".pt", ".safetensors")) < 4.8 * weights
    )
    others = [word for word in SMALL if not word.startswith(("launcher", "sft.per_device"))]
    others += [f"launcher.processes={processes}", f"sft.per_device_train_batch_size={16 // processes}"]
    err = finish(start(tmp_path, *others, *how))
    assert re.search(rf"step \d+ was saved by 2 processes under .*; converted for {processes} process", err)
    rows, expected = outcome(stage)[1], undisturbed[1][1]
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert [row[1:] for row in rows] == [pytest.approx(row[1:], abs=2e-5) for row in expected]
    assert {file: file.read_bytes() for file in newest.rglob("*") if file.is_file()} == before
    assert not list(stage.glob("checkpoints/.staging/*"))


def test_a_failure_on_one_machine_ends_the_others(tmp_path, free_port):
    """The worker of the first does not wait for the other machine, so that nothing but the files tells it."""
    what = "raise KeyError('nobody home')\n    if calls == 3:\n        [time.sleep(9) for _ in range(400)]"
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what=what))
    both = [word for word in PPO if word != "launcher.processes=2"]
    both += ["launcher.processes=1", "launcher.nodes=2", f"launcher.rdzv_endpoint=127.0.0.1:{free_port()}"]
    first, second = (start(tmp_path, *both, f"launcher.node_rank={rank}") for rank in (0, 1))
    told = finish(second, 1)
    assert "KeyError: 'nobody home'" in told
    assert "KeyError: 'nobody home'" in finish(first, 1)
    wait_until_gone(tmp_path)


def test_two_machines_are_the_same_command_with_their_numbers(tmp_path, undisturbed, free_port):
    """Both are this one here; they meet at an address, and the first keeps the books."""
    both = [word for word in SMALL if not word.startswith("launcher")]
    both += [
        "distributed=zero3",
        "launcher.processes=1",
        "launcher.nodes=2",
        f"launcher.rdzv_endpoint=127.0.0.1:{free_port()}",
    ]
    second = start(tmp_path, *both, "launcher.node_rank=1")
    time.sleep(3)
    assert not (tmp_path / "run").exists(), "only the first writes"
    first = start(tmp_path, *both, "launcher.node_rank=0")
    finish(first)
    finish(second)
    weights, rows = outcome(tmp_path / "run" / "sft")
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert (weights, rows) == undisturbed[1]
