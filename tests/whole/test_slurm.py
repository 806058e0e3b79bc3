"""Runs as jobs of a real SLURM here: chains, preemption, crashes, lost machines, sweeps, and what is said of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from support.files import outcome
from support.processes import beat, beats, finish, start, wait_for_step, wait_until
from support.slurm_cluster import (
    ONE,
    TINY,
    job,
    logged_in,
    started,
    states,
    wait_for_end,
    wait_for_more_steps,
    wait_for_state,
)

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.spread(2)]

TWO = (*ONE, "launcher.nodes=2", "distributed=ddp")
LONG = "sft.max_steps=200000"  # never done before something happens to it


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    yield from started(tmp_path_factory)


@pytest.fixture
def alignctl(cluster, tmp_path):
    yield from logged_in(cluster, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of two processes on this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, *TINY, "distributed=ddp", "launcher.processes=2", "run_dir=run"))
    return folder / "run"


def test_a_chain_on_two_machines_gives_what_two_processes_here_give(alignctl, cluster, tmp_path, undisturbed):
    said = alignctl("submit", *TINY, *TWO, "run_dir=run")
    run = tmp_path / "run"
    first, second = job(run, "sft"), job(run, "dpo")
    assert f"submitted: sft is job {first}, dpo is job {second}\nsee `alignctl status run`" in said
    assert "has jobs in SLURM's queue" in alignctl("train", *TINY, *TWO, "run_dir=run", code=3)
    assert re.search(rf"dpo +queued +{second} .*waits: Dependency", alignctl("status", "run"))
    assert wait_for_state(alignctl, "run", "done") == {"sft": "done", "dpo": "done", "run": "done"}
    assert cluster.facts(first)["NumNodes"] == "2"
    for stage in ("sft", "dpo"):
        assert outcome(run / stage) == outcome(undisturbed / stage)
    hosts = {one["host"] for one in beats(run / "sft")}
    assert len(list((run / "sft" / "logs" / "attempt_1").glob("rank_*.log"))) == 2, hosts
    assert re.search(r"sft +done +\d+ +160/160 ", alignctl("status", "run"))
    assert "sft: step 160/160" in alignctl("logs", "run", "--stage", "sft")
    assert "train_runtime" in alignctl("logs", "run", "--stage", "sft", "--rank", "0")
    assert "already finished" in alignctl("resume", "run")
    recorded = json.loads((run / "status.json").read_text())["stages"]["dpo"]["job"]["command"]
    assert recorded.startswith(f"sbatch --parsable --dependency=afterok:{first} --kill-on-invalid-dep=yes ")


def test_preempted_by_signal_and_by_requeue_it_ends_as_if_nothing_had_been(alignctl, cluster, tmp_path, undisturbed):
    """Told to save as before the end of its time; requeued by an administrator; stopped for a job that goes first."""
    run = tmp_path / "run"
    alignctl("submit", *TINY, *TWO, "stages=[sft]", "run_dir=run")
    own = job(run, "sft")
    wait_for_step(run / "sft", 5)
    cluster.run("scancel", "--batch", "--signal=USR1", own)
    queued = re.compile(r"sft +queued .*step \d+ is saved; waits: ")
    wait_until(lambda: queued.search(alignctl("status", "run")), "not requeued")
    wait_for_more_steps(run / "sft", 5)
    cluster.run("scontrol", "requeue", own)
    wait_until(lambda: cluster.facts(own).get("Restarts") == "2", "not requeued")
    wait_for_more_steps(run / "sft", 5)
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: cluster.facts(own).get("Restarts") == "3", "not preempted")
    wait_for_state(alignctl, "run", "done")
    assert outcome(run / "sft") == outcome(undisturbed / "sft")
    said = alignctl("logs", "run")
    assert said.count("back into the queue") == 2, "SLURM's own requeue needs none of ours"
    assert said.count("continues after step") == 3
    assert json.loads((run / "status.json").read_text())["stages"]["sft"]["attempts"] == 4


def test_a_lost_machine_sends_the_job_back_and_it_continues(alignctl, cluster, tmp_path, undisturbed):
    run = tmp_path / "run"
    alignctl("submit", *TINY, *TWO, "stages=[sft]", "run_dir=run", "sft.save_steps=20")
    own = job(run, "sft")
    wait_for_step(run / "sft", 25)
    cluster.kill_node("n2")
    wait_until(lambda: cluster.facts(own).get("Restarts") == "1", "SLURM did not requeue it")
    assert "machine 1 of this job ended without a word" in alignctl("logs", "run")
    cluster.start_node("n2")
    wait_for_state(alignctl, "run", "done")
    assert outcome(run / "sft") == outcome(undisturbed / "sft")


def test_a_crash_ends_the_chain_and_is_shown(alignctl, cluster, tmp_path):
    """It is not put back into the queue. Once its cause is gone, what is not done is submitted again."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say a.", "completion": "a"}\n' * 64)
    alignctl(
        "submit", *TINY, *ONE, "sft.data.path=rows.jsonl", "sft.data.eval_rows=0", "sft.eval.judge=null",
        'launcher.setup=["export KEY=value", "sleep 2"]', "run_dir=run",
    )  # fmt: skip
    (tmp_path / "rows.jsonl").rename(tmp_path / "away")
    wait_for_end(alignctl, "run", "failed")
    first = job(tmp_path / "run", "sft")
    assert cluster.facts(first)["JobState"] == "FAILED"
    assert cluster.facts(first)["ExitCode"] == "1:0"
    assert cluster.facts(first)["Restarts"] == "0"
    assert "rows.jsonl" in alignctl("status", "run"), "why"
    (tmp_path / "away").rename(tmp_path / "rows.jsonl")
    said = alignctl("resume", "run")
    assert f"sft is job {job(tmp_path / 'run', 'sft')}" in said
    wait_for_state(alignctl, "run", "done")


def test_alone_in_its_folder_cancelled_it_saves_and_is_resumed(alignctl, cluster, tmp_path):
    """Its script as a second job ends at once, and names the first. The worker has what `launcher.setup` sets, though
    sbatch hands hardly anything on."""
    run = tmp_path / "run"
    alignctl(
        "submit", *TINY, *ONE, "sft.max_steps=400", "run_dir=run", 'launcher.extra=["--export=PYTHONPATH"]',
        'launcher.setup=["export MARK=from_setup"]',
    )  # fmt: skip
    wait_for_step(run / "sft", 10)
    worker = Path("/proc", str(beat(run / "sft")["pid"]), "environ").read_bytes().split(b"\0")
    assert b"MARK=from_setup" in worker
    first = job(run, "sft")
    twice = ("sbatch", "--parsable", f"--output={tmp_path}/second.txt", str(run / "sft" / "job.sh"))
    second = cluster.run(*twice).strip()
    wait_until(lambda: cluster.queue()[second] not in ("PENDING", "RUNNING", "COMPLETING"), "it does not end")
    assert cluster.facts(second)["ExitCode"] == "3:0"
    said = (tmp_path / "second.txt").read_text()
    assert said.startswith(f"error: job {first} is at {run}/sft, so job {second} does nothing\nhint: ")
    assert cluster.queue()[first] == "RUNNING"
    assert not (run / "sft" / "logs" / "attempt_2").exists()
    alignctl("cancel", "run")
    wait_for_end(alignctl, "run", "cancelled")
    assert set(cluster.queue()[one] for one in (job(run, "sft"), job(run, "dpo"))) == {"CANCELLED"}
    step = int(re.search(r"sft +cancelled .*step (\d+) is saved", alignctl("status", "run")).group(1))
    assert step >= 10
    assert "there is nothing to cancel" in alignctl("cancel", "run", code=3)
    os.symlink(f"{first} 0 elsewhere 1", run / "sft" / ".job")  # as if it could not let go
    alignctl("resume", "run")
    wait_for_step(run / "sft", step + 5)
    assert os.readlink(run / "sft" / ".job").startswith(f"{job(run, 'sft')} 0 ")
    assert f"continues after step {step}" in alignctl("logs", "run", "--stage", "sft")
    cluster.run("scancel", job(run, "sft"))  # not by our command
    wait_for_end(alignctl, "run", "cancelled")
    rows = [json.loads(line)["step"] for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))


def test_out_of_time_without_requeue_it_is_stopped(alignctl, cluster, tmp_path):
    """At the real end of a job's time: SLURM's signal comes up to a minute earlier than asked for."""
    alignctl(
        "submit", *TINY, *ONE, LONG, "launcher.time=00:20:00", "launcher.signal_seconds=20", "launcher.max_requeues=0",
        "run_dir=run",
    )  # fmt: skip
    own = job(tmp_path / "run", "sft")
    wait_for_step(tmp_path / "run" / "sft", 5)
    cluster.run("scontrol", "update", f"JobId={own}", f"TimeLimit={cluster.minutes(own) + 2}")
    wait_for_end(alignctl, "run", "stopped")
    assert "not back into the queue: launcher.max_requeues=0" in alignctl("logs", "run", "--stage", "sft")
    assert cluster.facts(own)["ExitCode"] == "75:0"


def test_a_sweep_is_an_array_after_one_shared_stage(alignctl, cluster, tmp_path):
    short = ("sft.max_steps=12", "dpo.max_steps=80")
    said = alignctl("train", *TINY, *ONE, *short, "dpo.beta=0.1,0.5", "-m", "run_dir=sweep")
    low, high = (tmp_path / "sweep" / f"dpo.beta={beta}" for beta in (0.1, 0.5))
    array = job(low, "dpo").partition("_")[0]
    assert (job(low, "dpo"), job(high, "dpo")) == (f"{array}_0", f"{array}_1")
    assert said.count("sft is job") == 1, "one for both"
    wait_for_step(high / "dpo", 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job(high, "dpo"))
    for run in ("sweep/dpo.beta=0.1", "sweep/dpo.beta=0.5"):
        wait_for_state(alignctl, run, "done")
    assert [cluster.facts(job(run, "dpo"))["Restarts"] for run in (low, high)] == ["0", "1"], "of the array, one"
    assert (high / "sft").resolve() == (low / "sft").resolve()
    assert outcome(low / "dpo") != outcome(high / "dpo")
    assert cluster.facts(job(high, "dpo"))["Dependency"] != "", "known to SLURM"
    assert "done in sweep/dpo.beta=0.1" in alignctl("status", "sweep/dpo.beta=0.5")
    shutil.copytree(tmp_path / "sweep", tmp_path / "runs")
    assert alignctl("status", "--all").count(" done ") == 2


def test_what_slurm_refuses_leaves_nothing_in_the_queue(alignctl, cluster, tmp_path):
    before = set(cluster.queue())
    said = alignctl("submit", *TINY, *ONE, "+launcher.stages.dpo.partition=nope", "run_dir=run", code=3)
    assert said.startswith("error: SLURM refused the job: ")
    assert "invalid partition" in said
    assert "hint: set `launcher.partition`; there are main, urgent" in said
    assert len(said.splitlines()) == 2
    new = {one: state for one, state in cluster.queue().items() if one not in before}
    assert set(new.values()) == {"CANCELLED"}, "the job of sft, which was on hold"
    assert states(alignctl, "run")["run"] == "cancelled"
    many = ("launcher=slurm", "launcher.gpus_per_node=5", "launcher.cpus_per_process=null", "distributed=ddp")
    said = alignctl("submit", *TINY, *many, "run_dir=many", code=3)
    assert "set `launcher.gpus_per_node`" in said


VIEWS = {
    "SQUEUE_FORMAT": "%A", "SQUEUE_PARTITION": "urgent", "SQUEUE_USERS": "nobody", "SQUEUE_ACCOUNT": "other",
    "SQUEUE_STATES": "RUNNING", "SQUEUE_NAMES": "another", "SCANCEL_PARTITION": "urgent", "SCANCEL_NAME": "another",
    "SCANCEL_STATE": "RUNNING", "SACCT_LOCAL": "1", "SINFO_PARTITION": "none", "SCONTROL_LOCAL": "1",
    "SBATCH_ARRAY_INX": "0-1", "SBATCH_WAIT": "1", "SBATCH_JOB_NAME": "another", "SRUN_EXPORT_ENV": "NONE",
}  # fmt: skip


def test_what_people_set_for_their_own_views_changes_nothing(alignctl, cluster, tmp_path):
    """A job that waits is queued, is not submitted twice, and is gone once it is cancelled; its partition is a person's
    default, and said."""
    own = VIEWS | {"SBATCH_PARTITION": "urgent"}
    asked = ("stages=[sft]", 'launcher.extra=["--begin=now+3600"]', "run_dir=run")
    assert "$ SBATCH_PARTITION=urgent sbatch " in mine(
        alignctl, cluster, own, "submit", *TINY, *ONE, *asked, "--dry-run"
    )
    said = mine(alignctl, cluster, own, "submit", *TINY, *ONE, *asked)
    assert "from your environment: SBATCH_PARTITION=urgent\n" in said
    first = job(tmp_path / "run", "sft")
    assert (cluster.facts(first)["Partition"], cluster.queue()[first]) == ("urgent", "PENDING")
    said = mine(alignctl, cluster, own, "status", "run")
    assert re.search(rf"sft +queued +{first} .*waits: BeginTime; with SBATCH_PARTITION=urgent", said)
    assert "has jobs in SLURM's queue" in mine(alignctl, cluster, own, "resume", "run", code=3)
    mine(alignctl, cluster, own, "cancel", "run")
    assert cluster.queue()[first] == "CANCELLED"
    assert states(alignctl, "run") == {"sft": "cancelled", "run": "cancelled"}


def mine(alignctl, cluster, variables: dict[str, str], *words: str, code: int = 0) -> str:
    """A command in an environment that has more in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setitem(cluster.env, name, value)
        return alignctl(*words, code=code)


def test_names_that_would_hurt_a_shell_are_harmless(alignctl, cluster, tmp_path):
    """In the name of the job, the run's folder and what is set up; with two cards, which exist in name only."""
    name = "a b'c\"d$(touch hurt)%j\nnew;line"
    cards = ("launcher=slurm", "launcher.gpus_per_node=2", "launcher.cpus_per_process=1", "distributed=ddp")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"defaults:\n  - quickstart\n  - _self_\nlauncher:\n  job_name: {json.dumps(name)}\n"
        '  setup: ["export CARDS=$CUDA_VISIBLE_DEVICES", "echo cards: $CARDS"]\n'
    )
    arguments = [word for word in TINY if not word.startswith("recipe")]
    alignctl(
        "submit", "recipe=./mine.yaml", *arguments, *cards, "stages=[sft]", "sft.max_steps=4", "sft.use_cpu=true",
        "run_dir=run", folder=folder,
    )  # fmt: skip
    run = os.path.relpath(folder / "run", tmp_path)
    wait_for_state(alignctl, run, "done")
    assert "cards: 0,1" in alignctl("logs", run)
    assert not list(tmp_path.rglob("hurt"))
    assert re.fullmatch(r"[\w.-]+-sft", cluster.facts(job(folder / "run", "sft"))["JobName"])
