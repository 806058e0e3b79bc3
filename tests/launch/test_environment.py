"""What others leave in the environment: taken out, but for what the user meant for us."""

from __future__ import annotations

import pytest

from alignctl.launch.environment import (
    handing_on,
    own_environment,
    sbatch_defaults,
    shown_defaults,
    slurm_environment,
)

OURS = {"HF_TOKEN": "x", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2", "WANDB_MODE": "offline", "PATH": "/bin"}
OTHERS = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "PARALLELISM_CONFIG_TP_SIZE", "RANK",
    "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "PET_NPROC_PER_NODE", "OMPI_COMM_WORLD_SIZE", "PMI_RANK",
)  # fmt: skip


@pytest.mark.parametrize("in_job", [False, True])
def test_other_launchers_say_nothing(in_job):
    assert own_environment(OURS | dict.fromkeys(OTHERS, "1"), in_job) == OURS


def test_an_outer_job_is_not_ours():
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
    assert own_environment(OURS | job, in_job=False) == OURS
    assert own_environment(OURS | job, in_job=True) == OURS | job


VIEWS = (
    "SLURM_JOB_ID", "SLURM_CLUSTERS", "SQUEUE_PARTITION", "SQUEUE_USERS", "SQUEUE_ACCOUNT", "SQUEUE_STATES",
    "SQUEUE_NAMES", "SQUEUE_FORMAT", "SCANCEL_PARTITION", "SCANCEL_NAME", "SCANCEL_STATE", "SCANCEL_INTERACTIVE",
    "SACCT_FEDERATION", "SCONTROL_ALL", "SINFO_PARTITION", "SRUN_EXPORT_ENV", "SBATCH_ARRAY_INX", "SBATCH_WAIT",
    "SBATCH_PARTITION", "SBATCH_OUTPUT", "SBATCH_CLUSTERS",
)  # fmt: skip


@pytest.mark.parametrize("variable", VIEWS)
def test_slurm_s_commands_do_what_their_command_line_says(variable):
    reach = OURS | {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "x"}
    assert slurm_environment(reach | {variable: "1"}) == reach


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("SBATCH_ACCOUNT", "--account=b"), ("SBATCH_PARTITION", "-pb"), ("SBATCH_QOS", "--qos=b"),
        ("SBATCH_CONSTRAINT", "--constraint=b"), ("SBATCH_RESERVATION", "--reservation=b"),
        ("SBATCH_NODELIST", "-wb"), ("SBATCH_EXCLUDE", "--exclude=b"), ("SBATCH_TIMELIMIT", "--time=5"),
        ("SBATCH_EXPORT", "--export=NONE"),
    ],
)  # fmt: skip
def test_defaults_of_a_person_stay_unless_an_option_says_it(variable, option):
    environ = OURS | dict.fromkeys(VIEWS, "1") | {variable: "a"}
    assert sbatch_defaults(environ, ["--nodes=1", "--exclusive"])[variable] == "a"
    assert variable not in sbatch_defaults(environ, ["--nodes=1", option])
    assert set(sbatch_defaults(environ, [])) == {variable, "SBATCH_PARTITION"}


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ([], {}, "--export=ALL,DOOR_KEY"),
        (["--export=NONE"], {}, "--export=DOOR_KEY"),
        (["--export=HOME,DOOR_KEY"], {}, "--export=HOME,DOOR_KEY"),
        (["--export=ALL,A=1"], {"SBATCH_EXPORT": "NONE"}, "--export=ALL,A=1,DOOR_KEY"),
    ],
)
def test_a_job_is_handed_variables_by_their_names(options, environ, expected):
    assert handing_on(["--time=5", *options], ["DOOR_KEY"], environ) == ["--time=5", expected]
    assert handing_on(options, [], environ) == options


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("NONE", "DOOR_KEY"),
        ("ALL,OTHER_KEY=abcdef", "ALL,OTHER_KEY=abcdef,DOOR_KEY"),
        ("HOME,DOOR_KEY", "HOME,DOOR_KEY"),
    ],
)
def test_what_sbatch_export_gives_stands_on_no_command_line(said, expected):
    environ = {"SBATCH_EXPORT": said}
    options = handing_on(["--time=5"], ["DOOR_KEY"], environ)
    assert options == ["--time=5"]
    assert sbatch_defaults(environ, options, ["DOOR_KEY"]) == {"SBATCH_EXPORT": expected}
    assert sbatch_defaults(environ, options) == environ


def test_values_that_sbatch_export_gives_are_not_shown():
    shown = shown_defaults({"SBATCH_EXPORT": "ALL,A='b,c',D=\"e,f\",G=h,I"})
    assert shown == {"SBATCH_EXPORT": "ALL,A=***,D=***,G=***,I"}
