"""Scripts and options of SLURM jobs against recorded text, and with values that would hurt a shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, expand_sweep, read_request
from alignctl.launch import slurm_script
from alignctl.launch.slurm import commands, plan_jobs, scripts
from alignctl.plan.freeze import freeze
from alignctl.plan.plan import make_plan

RECORDED = Path(__file__).parent / "recorded"
PYTHON = "launcher.python=/opt/python"


def plans(*arguments: str, run_dir: str = "/runs/mine"):
    """Of every point of a request, checked."""
    made = []
    for number, point in enumerate(expand_sweep(read_request(arguments))):
        config, problems = compose(point)
        assert not problems + find_problems(config)
        made.append(make_plan(config, point.recipe.name, Path(run_dir + (f"/{number}" if number else ""))))
    return made


def rendered(*arguments: str) -> str:
    """What would be submitted, as `--dry-run` prints it."""
    jobs = plan_jobs(plans(*arguments))
    text = []
    for job, command in zip(jobs, commands(jobs, {}), strict=True):
        text += [f"$ {command}", *(f"# {path}\n{script}" for path, script in scripts(job).items())]
    return "\n".join(text)


SITES = {
    "generic": ("recipe=quickstart", "launcher=slurm", PYTHON, "launcher.time=02:00:00"),
    "two_machines": (
        "recipe=rlhf_quickstart", "launcher=slurm", PYTHON, "launcher.nodes=2", "launcher.gpus_per_node=8",
        "distributed=zero3", "launcher.partition=[gpu,spare]", "launcher.account=ours", "launcher.qos=high",
        "launcher.mem=0",
        "+launcher.stages.sft={nodes: 1, gpus_per_node: 4}", "launcher.constraint=[h100,ib]", "launcher.nodelist=n7",
        'launcher.extra=["--reservation=ours"]',
    ),
    "preemptible": ("recipe=quickstart", "launcher=slurm_preemptible", PYTHON),
    "apptainer": ("recipe=quickstart", "launcher=slurm_apptainer", 'launcher.srun=["--mpi=none"]'),
    "sweep": ("recipe=quickstart", "launcher=slurm", PYTHON, "dpo.beta=0.1,0.2,0.5"),
}  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_as_recorded(site):
    """After a change that is meant: ALIGNCTL_RECORD=1 writes the text anew, to be read before it is committed."""
    file, text = RECORDED / f"{site}.txt", rendered(*SITES[site])
    if os.environ.get("ALIGNCTL_RECORD"):
        file.write_text(text)
    assert text == file.read_text()
    for path, script in scripts_of(site).items():
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0, path


def scripts_of(site: str) -> dict[Path, str]:
    return {path: text for job in plan_jobs(plans(*SITES[site])) for path, text in scripts(job).items()}


def test_stages_of_a_sweep_that_are_the_same_run_once():
    """Two learning rates of SFT, three betas of DPO: two jobs of SFT in an array, and after each an array of three."""
    jobs = plan_jobs(
        plans("recipe=quickstart", "launcher=slurm", "sft.learning_rate=1e-3,2e-3", "dpo.beta=0.1,0.2,0.5")
    )
    assert [[stage.config.name for _, stage in job.parts] for job in jobs] == [["sft"] * 2, ["dpo"] * 3, ["dpo"] * 3]
    assert [job.after for job in jobs] == [(), ((0, 0),), ((0, 1),)]
    assert "--dependency=afterok:7_1 " in commands(jobs, {}, ["7", "8", "9"])[2]


def test_a_stage_waits_for_all_before_it():
    """PPO needs its own reward model, and DPO, which is the same for both."""
    jobs = plan_jobs(plans("recipe=sft_dpo_ppo_quickstart", "launcher=slurm", "rm.learning_rate=1e-3,2e-3"))
    names = [[stage.config.name for _, stage in job.parts] for job in jobs]
    ppos = [job for job, parts in zip(jobs, names, strict=True) if parts == ["ppo"]]
    rm, dpo = names.index(["rm", "rm"]), names.index(["dpo"])
    assert [set(job.after) >= {(rm, part), (dpo, 0)} for part, job in enumerate(ppos)] == [True, True]


def test_a_point_that_has_begun_a_stage_does_it_itself(tmp_path):
    first, second = plans("recipe=quickstart", "launcher=slurm", "dpo.beta=0.1,0.2", run_dir=str(tmp_path))
    (second.paths.stage("sft").root / "checkpoints").mkdir(parents=True)
    jobs = plan_jobs([first, second])
    assert [stage.config.name for job in jobs for _, stage in job.parts] == ["sft", "sft", "dpo", "dpo"]
    assert [job.after for job in jobs] == [(), ((0, 0),), ((0, 1),)]


NASTY = "a b'c\"d$(touch hurt)`touch hurt`%j\n;touch hurt;#"


def test_nothing_in_a_value_reaches_the_shell(tmp_path):
    """The script is run, with commands in place of SLURM's that write down the words they get."""
    run_dir = str(tmp_path / NASTY)
    words = ["recipe=quickstart", "launcher=slurm", "stages=[sft]"]
    config, _ = compose(read_request(words))
    config["launcher"] |= {
        "container": ["apptainer", NASTY], "python": f"/opt/{NASTY}", "job_name": NASTY, "srun": [f"--x={NASTY}"],
        "partition": NASTY, "extra": [f"--comment={NASTY}"], "setup": ["export READY=yes"],
    }  # fmt: skip
    assert not find_problems(config)
    (job,) = plan_jobs([make_plan(config, "quickstart", Path(run_dir))])
    job.script.parent.mkdir(parents=True)
    commands_folder = tmp_path / "bin"
    commands_folder.mkdir()
    for name in ("srun", "scontrol"):
        (commands_folder / name).write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >>"$WORDS"\n[[ {name} != scontrol ]] || echo n1 NodeAddr=first\n'
        )
        (commands_folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash"], input=scripts(job)[job.script], text=True, capture_output=True, cwd=tmp_path, check=False,
        env={"PATH": f"{commands_folder}:/usr/bin:/bin", "WORDS": str(tmp_path / "words"), "SLURM_JOB_ID": "12",
             "SLURM_JOB_NODELIST": "n[1-2]"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = (tmp_path / "words").read_text().split("\0")
    srun = ran[ran.index("srun") :]
    assert srun.index("--export=ALL") < srun.index(f"--x={NASTY}"), "which may say otherwise"
    numbered = srun[srun.index(f"--x={NASTY}") + 1 :]
    assert numbered[4:6] == ["apptainer", NASTY]
    said = subprocess.run(
        [*numbered[:4], "printf", "%s|", NASTY, srun[-2]], env={"PATH": "/usr/bin:/bin", "SLURM_NODEID": "1"},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert said.stdout == f"{NASTY}|--meet=first:10012|--machine=1|"
    assert srun[srun.index(f"/opt/{NASTY}") :][1:7] == ["-P", "-m", "alignctl", "node", run_dir, "sft"]
    assert srun[-2] == "--meet=first:10012"
    assert not list(tmp_path.rglob("hurt"))
    (command,) = commands([job], {})
    assert f"--partition={NASTY}" in shlex.split(command), "one word each"
    output = next(word for word in shlex.split(command) if word.startswith("--output="))
    assert output.endswith("%%j\n;touch hurt;#/sft/logs/job_%j.log"), "a percent sign of the folder's is not a pattern"


@pytest.mark.parametrize(
    ("holder", "said", "refused"),
    [
        (None, "", None),
        ("7 0 there 1", "JobId=7 JobState=RUNNING Reason=None", "job 7 is at STAGE, so"),
        ("7 3 there 1", "JobId=7 JobState=PENDING Reason=BeginTime", "job 7 is at STAGE, so"),
        ("7 0 there 1", "slurm_load_jobs error: Unable to contact slurm controller", "job 7 is at STAGE, so"),
        ("7 0 there 1", "JobId=7 JobState=CANCELLED Reason=None", None),
        ("7 0 there 1", "slurm_load_jobs error: Invalid job id specified", None),
        ("7 a[$(touch${IFS}hurt)] there 1", "JobId=7 JobState=CANCELLED Reason=None", "STAGE/.job is no link of a job"),
        ("12_0 0 there 1", "JobId=12 ArrayJobId=12 JobState=RUNNING Reason=None", "job 12_0 is at STAGE, so"),
        ("12 2 HOST PID", "JobId=12 JobState=RUNNING Reason=None", "job 12 is at STAGE, so"),
        ("12 1 HOST 4194305", "JobId=12 JobState=RUNNING Reason=None", None),  # more than there are process ids
        ("12 1 HOST PID", "JobId=12 JobState=RUNNING Reason=None", None),
        ("12 0 there 1", "JobId=12 JobState=RUNNING Reason=None", None),
    ],
)  # fmt: skip
def test_one_job_at_a_time_is_at_a_stage(tmp_path, monkeypatch, holder, said, refused):
    """The script is run as job 12, which was started for the third time; srun writes down who has the stage then."""
    monkeypatch.setattr(slurm_script, "_OLD_STEP_S", 3)
    (job,) = plan_jobs(plans("recipe=quickstart", "launcher=slurm", "stages=[sft]", run_dir=str(tmp_path / "run")))
    lock = tmp_path / "run" / "sft" / ".job"
    lock.parent.mkdir(parents=True)
    host, before = os.uname().nodename, subprocess.Popen(["sleep", "60"])
    if holder:
        lock.symlink_to(holder.replace("HOST", host).replace("PID", str(before.pid)))
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\n[[ $* != "show config" ]] || echo "KillWait                = 1 sec"\n'
        f'[[ $* != *"show job"* ]] || {{ echo "{said}"; [[ "{said}" == JobId* ]]; exit; }}\necho n1 NodeAddr=first\n'
    )
    (tmp_path / "srun").write_text(f"#!/bin/bash\nreadlink {shlex.quote(str(lock))} >>{tmp_path}/ran\n")
    for command in ("scontrol", "srun"):
        (tmp_path / command).chmod(0o755)
    began = time.monotonic()
    done = subprocess.run(
        ["bash"], input=scripts(job)[job.script], text=True, capture_output=True, check=False, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1",
             "SLURM_RESTART_COUNT": "2"},
    )  # fmt: skip
    waited = time.monotonic() - began
    before.kill()
    before.wait()
    assert done.returncode == (3 if refused else 0), done.stdout + done.stderr
    assert not (tmp_path / "hurt").exists()
    if refused:
        assert done.stdout.startswith(f"error: {refused.replace('STAGE', str(lock.parent))}")
        assert not (tmp_path / "ran").exists()
        assert lock.is_symlink(), "it stays the other's"
        return
    assert (tmp_path / "ran").read_text().startswith(f"12 2 {host} ")
    assert not lock.is_symlink(), "it lets go at its end"
    still_there = bool(holder) and holder in ("12 1 HOST PID", "12 0 there 1")
    assert ("waits until what this job's start before left has ended" in done.stdout) == still_there
    assert (waited >= 3) == still_there, "KillWait and what is added to it"


@pytest.mark.parametrize(
    ("holder", "readlink"),
    [("7 0 there 1", ""), ("8 0 there 1", "echo >>calls; [[ $(wc -l <calls) != 2 ]] || exit 1")],
    ids=["taken over while it is asked whether job 7 has ended", "let go of, and taken, while it is looked at"],
)
def test_a_lock_that_another_job_takes_just_then_is_the_other_s(tmp_path, holder, readlink):
    (job,) = plan_jobs(plans("recipe=quickstart", "launcher=slurm", "stages=[sft]", run_dir=str(tmp_path / "run")))
    lock = tmp_path / "run" / "sft" / ".job"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(holder)
    does = {
        "scontrol": f"[[ $* != *' 7' ]] || {{ ln -sfT '8 0 there 1' {shlex.quote(str(lock))}; state=CANCELLED; }}\n"
        'echo "JobId=7 JobState=${state:-RUNNING} Reason=None"',
        "readlink": f'{readlink}\nPATH=/usr/bin:/bin exec readlink "$@"',
        "srun": "exit 1",
    }
    for name, text in does.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash"], input=scripts(job)[job.script], text=True, capture_output=True, check=False, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith(f"error: job 8 is at {lock.parent}, so job 12 does nothing")
    assert os.readlink(lock) == "8 0 there 1"


def test_what_counts_of_the_environment_is_in_the_command():
    """sbatch reads it: defaults of a site or a person, unless the launcher says it; nothing else, and no secret."""
    site = {"SBATCH_PARTITION": "a b", "SBATCH_QOS": "low", "SBATCH_EXPORT": "KEY=secret,HOME", "SBATCH_WAIT": "1"}
    (job,) = plan_jobs(plans("recipe=quickstart", "launcher=slurm", "stages=[sft]", "launcher.qos=high"))
    (command,) = commands([job], site)
    assert command.startswith("SBATCH_EXPORT='KEY=***,HOME' SBATCH_PARTITION='a b' sbatch --parsable ")
    assert "secret" not in command


@pytest.mark.parametrize("machine", [(), ("--machine=",), ("--machine=2",), ("--machine=-1",)])
def test_one_of_several_machines_that_has_no_number_is_refused(alignctl, tmp_path, machine):
    config, _ = compose(read_request(["recipe=quickstart", "launcher=slurm", "launcher.nodes=2", "distributed=ddp"]))
    freeze(make_plan(config, "quickstart", tmp_path / "run"), config, [])
    done = alignctl("node", str(tmp_path / "run"), "sft", "--meet=n1:10012", *machine)
    assert done.code == 3
    assert done.err.startswith("error: `launcher.nodes=2`, and which of the machines this is was not said: `--machine=")
    assert "SLURM_NODEID" in done.err
    assert len(done.err.splitlines()) == 2
    assert not (tmp_path / "run" / "sft").exists()


def test_dry_run_needs_no_slurm(alignctl):
    done = alignctl("submit", "recipe=sft_dpo_llama3", "launcher.partition=gpu", "--dry-run")
    assert done.code == 0, done.err
    assert "$ sbatch --parsable --dependency=afterok:JOB_OF_SFT --kill-on-invalid-dep=yes" in done.out
    assert done.out.count("#!/bin/bash") == 2
    done = alignctl("submit", "recipe=sft_dpo_llama3", "--dry-run", "--json")
    assert json.loads(done.out)["plan"]["stages"][0]["config"]["launcher"]["type"] == "slurm"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launcher.partition=gpu"], "`launcher.partition` would have no effect: only SLURM knows it"),
        (["launcher=slurm", "launcher.gpus_per_node=null"], "`launcher` does not say what a job needs"),
        (["launcher=slurm", "+launcher.node_rank=1"], "SLURM says which machine is which"),
        (["launcher=slurm", "launcher.time=soon"], "`launcher.time=soon` is not a time"),
        (["launcher=slurm", "launcher.time=90"], """for minutes `'launcher.time="90"'`"""),
        (["launcher=slurm", 'launcher.extra=["--part=gpu"]'], "it follows from launcher.partition"),
        (["launcher=slurm", "launcher.stages.sft.nodes=0"], "`launcher.stages.sft.nodes` must be at least 1"),
        (["launcher=slurm", "launcher.time=00:02:00"], "a job would save before it works"),
        (["launcher=slurm", 'launcher.extra=["--dependency=afterok:1"]'], "is not to be given: it follows from stages"),
        (["launcher=slurm", "launcher.extra=[-pgpu]"], "it follows from launcher.partition"),
        (["launcher=slurm", "launcher.extra=[h100]"], "`h100` is not an option"),
        (["launcher=slurm", "launcher.constraint=a", "launcher.extra=[-Cb]"], "stands beside `launcher.constraint`"),
        (["launcher=slurm", "launcher.partitoin=gpu"], "did you mean `launcher.partition`"),
        (["launcher=slurm", "+launcher.stages.stf.nodes=1"], "did you mean `sft`"),
        (["launcher=slurm", "+launcher.stages.sft.node=1"], "did you mean `launcher.stages.sft.nodes`"),
        (["launcher=slurm", "+launcher.stages.sft.nodes=2"], "`launcher.stages.sft` asks for 2 processes"),
        (["launcher=slurm", 'launcher.setup=["export HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz"]'], "looks like a token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_makes_no_sense_is_refused(alignctl, arguments, expected):
    done = alignctl("train", "recipe=quickstart", *arguments, "--dry-run")
    assert done.code == 2, done.out
    assert expected in done.err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["launcher.partition=main,urgent"], "--partition=main,urgent"),
        (["launcher.nodelist=n1, n2"], "--nodelist=n1,n2"),
        (["launcher.account=a,b"], "--account=a,b"),
        (["launcher.extra=[--begin=now+3600,--exclusive]"], "--begin=now+3600 --exclusive"),
        (["launcher.time=90"], "--time=90"),
        (["launcher.gpus_per_node=null"], "--gres=gpu:8"),
        (["launcher.nodes=2"], "--nodes=2"),
        (["launcher.qos=high", "launcher=local"], "--qos=high"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_hint_says_is_taken_when_it_is_typed(arguments, option):
    """Each hint is typed as a shell would read it, until nothing is refused any more."""
    words = ["recipe=quickstart", "launcher=slurm", *arguments]
    for _ in range(3):
        config, problems = compose(read_request(words))
        problems = problems or find_problems(config)
        if not problems:
            break
        (problem, *_) = problems
        typed = next(word for word in re.findall(r"`([^`]+)`", problem.hint) if "=" in word)
        (said,) = shlex.split(typed)
        words = [word for word in words if word.partition("=")[0] != said.partition("=")[0]] + [said]
    assert f"{option} " in shlex.join(plan_jobs(plans(*words))[0].options) + " "
