"""The environment of the processes of a stage: what others left in it that would train otherwise is taken out.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping

_OTHERS = (
    "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "MV2_", "OMPI_", "PARALLELISM_CONFIG_", "PET_", "PMI_", "TORCHELASTIC_",
)  # fmt: skip
"""How the variables of other launchers begin: accelerate's, torchrun's, MPI's."""
_RANKS = {
    "FORK_LAUNCHED", "GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "NODE_RANK", "RANK", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "WORLD_SIZE",
}  # fmt: skip
"""Which process of how many: what we start by ourselves is alone, and torchrun says it to those that it starts."""
_JOB = ("SLURM_", "SLURMD_")


def own_environment(environ: Mapping[str, str], in_job: bool) -> dict[str, str]:
    """An environment without what other launchers say of precision and of processes.

    Args:
        in_job: Whether the stage is a SLURM job of ours; else SLURM's variables are an outer job's.
    """
    begins = _OTHERS if in_job else _OTHERS + _JOB
    return {key: value for key, value in environ.items() if key not in _RANKS and not key.startswith(begins)}
