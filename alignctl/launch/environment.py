"""The environment of the processes of a stage, and of SLURM's commands: what others left in it that would train
otherwise, or speak for us to SLURM, is taken out.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from alignctl.config.secrets import MASK, mask

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
_SPEAK = (*_JOB, "SACCT_", "SBATCH_", "SCANCEL_", "SCONTROL_", "SINFO_", "SQUEUE_", "SRUN_")
"""How the variables begin that are options of SLURM's commands: an outer job's, and those of people for views of their
own, which no option of ours overrides (`SQUEUE_PARTITION`)."""
_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Where SLURM is, and who asks."""
_DEFAULTS = {
    "SBATCH_ACCOUNT": ("--account", "-A"), "SBATCH_CONSTRAINT": ("--constraint", "-C"),
    "SBATCH_EXCLUDE": ("--exclude", "-x"), "SBATCH_EXPORT": ("--export", None),
    "SBATCH_NODELIST": ("--nodelist", "-w"), "SBATCH_PARTITION": ("--partition", "-p"), "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_RESERVATION": ("--reservation", None), "SBATCH_TIMELIMIT": ("--time", "-t"),
}  # fmt: skip
"""Variables that people and sites set for all their jobs, and the options that they stand for."""
_EXPORT = "--export="
_VALUE = re.compile(r"""=('[^']*'|"[^"]*"|[^,]*)""")  # of a variable in what is exported; quoted if it has commas


def own_environment(environ: Mapping[str, str], in_job: bool) -> dict[str, str]:
    """An environment without what other launchers say of precision and of processes.

    Args:
        in_job: Whether the stage is a SLURM job of ours; else SLURM's variables are an outer job's.
    """
    begins = _OTHERS if in_job else _OTHERS + _JOB
    return {key: value for key, value in environ.items() if key not in _RANKS and not key.startswith(begins)}


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for SLURM's commands, which then do what they are told on their command line and nothing else."""
    return {key: value for key, value in environ.items() if key in _REACH or not key.startswith(_SPEAK)}


def sbatch_defaults(environ: Mapping[str, str], options: Sequence[str], names: Sequence[str] = ()) -> dict[str, str]:
    """What sbatch's variables say that stays, because it may be meant for all jobs and no option says it.

    Args:
        options: Of sbatch, one word each.
        names: Variables that a job has to have, which SBATCH_EXPORT lists then, too.
    """
    given = [option.partition("=")[0] for option in options]
    stay = {
        variable: environ[variable]
        for variable, (long, short) in _DEFAULTS.items()
        if environ.get(variable) and not any(long == option or (short and option[:2] == short) for option in given)
    }
    return stay | {key: _listing(value, names) for key, value in stay.items() if key == "SBATCH_EXPORT"}


def shown_defaults(defaults: Mapping[str, str]) -> dict[str, str]:
    """The same without the values of variables that `SBATCH_EXPORT` gives to the job, and without tokens."""
    export = {key: _VALUE.sub(f"={MASK}", value) for key, value in defaults.items() if key == "SBATCH_EXPORT"}
    return mask({**defaults, **export})


def handing_on(options: Sequence[str], names: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Options of sbatch with which a job has some variables, whatever else it is handed: by their names, for what
    stands on a command line others see. `--export=NONE` becomes `--export=NAME`. Where SBATCH_EXPORT says what is
    handed on, which may have values, it says this as well (`sbatch_defaults`), and no option does.

    Args:
        options: Of sbatch, one word each.
    """
    given = [option.partition("=")[2] for option in options if option.startswith(_EXPORT)]
    if not names or (not given and environ.get("SBATCH_EXPORT")):
        return list(options)
    listed = _listing(given[-1] if given else "ALL", names)
    return [*(option for option in options if not option.startswith(_EXPORT)), f"{_EXPORT}{listed}"]


def _listing(exported: str, names: Sequence[str]) -> str:
    """What is exported, as sbatch is told, and some variables with it."""
    if not names:
        return exported
    listed = [] if exported.upper() in ("NONE", "NIL") else exported.split(",")
    return ",".join([*listed, *(name for name in names if name not in listed)])
