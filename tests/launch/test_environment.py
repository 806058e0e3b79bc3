"""What others leave in the environment: taken out, but for what the user meant for us."""

from __future__ import annotations

import pytest

from alignctl.launch.environment import own_environment

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
