"""Runs of several processes through the command: stopped, killed, failed and stuck ones, and what is said of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.train, pytest.mark.slow]

SMALL = (
    "recipe=quickstart", "stages=[sft]", "data.limit=96", "data.eval_limit=8", "eval.prompts=0", "log_every=1",
    "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64", "model.scratch.vocab_size=400",
    "sft.num_train_epochs=8", "sft.logging_steps=1", "sft.save_steps=5", "sft.per_device_train_batch_size=8",
    "sft.weight_decay=5", "launcher.processes=2",
)  # fmt: skip
STEPS = 48
FACTS = ("step", "loss", "learning_rate", "grad_norm")


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "alignctl", "train", *arguments, "run_dir=run"],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(run: subprocess.Popen, code: int, timeout_s: float = 120) -> str:
    _, err = run.communicate(timeout=timeout_s)
    assert run.returncode == code, err
    return err


def beat(stage: Path, rank: int) -> dict:
    try:
        return json.loads((stage / "ranks" / f"rank_{rank}.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for_step(stage: Path, step: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while (beat(stage, 0).get("step") or 0) < step or beat(stage, 0).get("doing") != "training":
        assert time.monotonic() < deadline, f"{stage} did not reach step {step}"
        time.sleep(0.02)


def result(stage: Path) -> tuple[str, list]:
    """Hash of the weights, and what was logged."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((stage / "model" / "model.safetensors").read_bytes()).hexdigest()
    return weights, [[row.get(fact) for fact in FACTS] for row in rows]


def workers(folder: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"alignctl.(worker|agent) {folder}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def gone(folder: Path, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while workers(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not workers(folder)


@pytest.fixture(scope="module", params=["zero3"])
def undisturbed(request, tmp_path_factory):
    """How several processes work together, and the result of a run that was left alone."""
    folder = tmp_path_factory.mktemp(request.param)
    finish(start(folder, *SMALL, f"distributed={request.param}"), 0)
    return f"distributed={request.param}", result(folder / "run" / "sft")


def test_all_ranks_stop_at_one_step_and_continue_as_if_nothing_had_been(tmp_path, undisturbed):
    """Asked by SIGTERM to the command, then by SIGUSR1 to one rank alone; then the command is killed, and a rank."""
    how, expected = undisturbed
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, 7)
    asked = time.monotonic()
    run.send_signal(signal.SIGTERM)
    err = finish(run, 75, 30)
    assert time.monotonic() - asked < 15  # a step and a save take less than a second here; the rest is for slow days
    saved = int(re.search(r"stopped: stage `sft`, step (\d+) is saved\nhint: run the same command again", err).group(1))
    assert 7 <= saved < STEPS
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 3)
    os.kill(beat(stage, 1)["pid"], signal.SIGUSR1)
    err = finish(run, 75, 30)
    assert f"continues after step {saved}" in err

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 8)
    os.kill(beat(stage, 1)["pid"], signal.SIGKILL)
    asked = time.monotonic()
    err = finish(run, 1, 30)
    assert time.monotonic() - asked < 30
    assert re.search(r"stage `sft`: rank 1 on \S+ after step \d+ was killed by signal 9", err)
    assert "Traceback" not in err
    assert gone(tmp_path)

    run = start(tmp_path, *SMALL, how)
    wait_for_step(stage, saved + 12)
    run.kill()
    run.wait(10)
    assert gone(tmp_path), "workers train on unseen"

    finish(start(tmp_path, *SMALL, how), 0)
    assert result(stage) == expected


PPO = (
    "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", "ppo.normalize_rewards=none",
    "ppo.reward_funcs=[rewards.py:reward]", "data.limit=64", "data.eval_limit=8", "eval.prompts=0",
    "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64", "model.scratch.vocab_size=400",
    "ppo.max_steps=8", "ppo.response_length=4", "ppo.per_device_train_batch_size=4", "log_every=1",
    "distributed=ddp", "launcher.processes=2",
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
    began = time.monotonic()
    err = finish(start(tmp_path, *PPO), 1, 90)
    assert time.monotonic() - began < 60
    assert re.search(r"stage `ppo`: rank 1 on \S+ after step 2 failed; from \S+rank_1.log:", err)
    assert "KeyError: 'nobody home'" in err
    assert len(err.splitlines()) < 60
    assert gone(tmp_path)


def test_the_error_of_a_rank_is_shown_though_another_does_not_even_end(tmp_path):
    """Which torchrun then kills: what it killed is not to blame."""
    what = "raise KeyError('nobody home')\n    if calls == 3:\n        [time.sleep(9) for _ in range(400)]"
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what=what))
    run = start(tmp_path, *PPO)
    error = tmp_path / "run" / "ppo" / "ranks" / "rank_1_error.json"
    while not error.exists():
        assert run.poll() is None
        time.sleep(0.05)
    failed = time.monotonic()
    err = finish(run, 1, 30)
    assert time.monotonic() - failed < 25
    assert "KeyError: 'nobody home'" in err
    assert gone(tmp_path)


def test_a_stuck_rank_is_named_with_what_it_was_doing(tmp_path):
    (tmp_path / "rewards.py").write_text(ON_RANK_1.format(what="time.sleep(3600)"))
    err = finish(start(tmp_path, *PPO, "launcher.stall_timeout=10"), 1, 90)
    assert re.search(r"rank 1 on \S+ after step 2 made no step for 10 s \(training\)", err)
    assert re.search(r'File "\S+rewards.py", line \d+ in reward', err), "where it was stuck"
    assert gone(tmp_path)


def test_a_rank_that_is_stopped_is_named(tmp_path):
    """It cannot say where it is; the others wait for it, and say so."""
    run = start(tmp_path, *SMALL, "distributed=ddp", "launcher.stall_timeout=10")
    wait_for_step(tmp_path / "run" / "sft", 5)
    os.kill(beat(tmp_path / "run" / "sft", 0)["pid"], signal.SIGSTOP)
    err = finish(run, 1, 60)
    assert re.search(
        r"rank 0 on \S+ after step \d+ made no step for 10 s .*, so .* it did not answer where it was", err
    )
    assert gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_every_process_at_once_is_one_request(tmp_path, number):
    """As schedulers send it: to the command, to torchrun, to the workers."""
    run = start(tmp_path, *SMALL, "distributed=ddp")
    wait_for_step(tmp_path / "run" / "sft", 5)
    for pid in [run.pid, *workers(tmp_path)]:
        os.kill(pid, number)
    err = finish(run, 75, 30)
    assert "is saved\nhint: run the same command again" in err
    assert gone(tmp_path)


def test_torchrun_alone_cannot_be_asked_to_stop(tmp_path):
    run = start(tmp_path, *SMALL, "distributed=ddp", "sft.num_train_epochs=2")
    wait_for_step(tmp_path / "run" / "sft", 3)
    (agent,) = (pid for pid in workers(tmp_path) if b"alignctl.agent" in Path(f"/proc/{pid}/cmdline").read_bytes())
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(agent, number)
    finish(run, 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launcher.processes=2"], "`launcher` asks for 2 processes, and `distributed` is none"),
        (["distributed=zero2"], "`distributed=zero2` needs to know how many processes there are"),
        (["distributed=fsdp2", "launcher.processes=2"], "`distributed=fsdp2` needs GPUs"),
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


def test_a_run_continues_on_other_processes_where_that_loses_nothing(tmp_path, alignctl):
    """The global batch is the same in all of them, so it is one run."""
    stage = tmp_path / "run" / "sft"
    run = start(tmp_path, *SMALL, "distributed=zero2")
    wait_for_step(stage, 6)
    run.send_signal(signal.SIGTERM)
    finish(run, 75, 30)
    alone = [word for word in SMALL if not word.startswith(("launcher", "sft.per_device"))]
    refused = alignctl("train", *alone, "sft.per_device_train_batch_size=16", "run_dir=run", folder=tmp_path)
    assert refused.code == 2
    assert "was written by 2 processes under ZeRO stage 2 and cannot be continued from by 1 process\n" in refused.err

    again = tmp_path / "again"
    again.mkdir()
    run = start(again, *SMALL, "distributed=ddp")
    wait_for_step(again / "run" / "sft", 6)
    run.send_signal(signal.SIGTERM)
    finish(run, 75, 30)
    err = finish(start(again, *alone, "sft.per_device_train_batch_size=16"), 0)
    assert "continues after step" in err
    steps = [row[0] for row in result(again / "run" / "sft")[1]]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("how", "processes"), [("zero2", 1), ("zero3", 1)])
def test_a_run_under_zero_continues_on_other_processes(tmp_path, undisturbed, how, processes):
    """With the loss curve of a run that was left alone, whose stage of ZeRO changes nothing but the rounding; and the
    checkpoint it continues from stays what it was."""
    stage, how = tmp_path / "run" / "sft", (f"distributed={how}", "sft.save_total_limit=20")
    run = start(tmp_path, *SMALL, *how)
    wait_for_step(stage, 7)
    run.send_signal(signal.SIGTERM)
    finish(run, 75, 30)
    *_, newest = sorted(stage.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    before = {file: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
    others = [word for word in SMALL if not word.startswith(("launcher", "sft.per_device"))]
    others += [f"launcher.processes={processes}", f"sft.per_device_train_batch_size={16 // processes}"]
    err = finish(start(tmp_path, *others, *how), 0)
    assert re.search(rf"step \d+ was saved by 2 processes under .*; converted for {processes} process", err)
    rows, expected = result(stage)[1], undisturbed[1][1]
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
    told = finish(second, 1, 90)
    failed = time.monotonic()
    assert "KeyError: 'nobody home'" in told
    assert "KeyError: 'nobody home'" in finish(first, 1, 40)
    assert time.monotonic() - failed < 30
    assert gone(tmp_path)


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
    finish(first, 0)
    finish(second, 0)
    weights, rows = result(tmp_path / "run" / "sft")
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert (weights, rows) == undisturbed[1]
