"""`alignctl node`, which SLURM jobs call: this machine's part of a stage. Torch-free."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from alignctl.cli.display import Display
from alignctl.config.schema import LauncherSettings, RunSettings
from alignctl.errors import LaunchError
from alignctl.launch.beforehand import look_beforehand, wait_until_looked
from alignctl.launch.local import part_of_job, run_stage
from alignctl.plan.freeze import read_plan, refuse_other_version
from alignctl.run.files import leave_json
from alignctl.run.paths import RunPaths
from alignctl.run.state import is_done, write_state


def node_command(run_dir: Path, stage_name: str, meet: str, number: str) -> None:
    """Runs it. Whatever comes of it, the job can see that this machine ended by itself.

    Args:
        number: Which of the machines this is, as the job's script said it.

    Raises:
        LaunchError: That is none of their numbers.
    """
    plan = read_plan(RunPaths(run_dir))
    planned = next(stage for stage in plan.stages if stage.config.name == stage_name)
    machine = _machine(planned.config.launcher, number)
    paths = plan.paths.stage(stage_name)
    if is_done(paths):  # put back into the queue when it had ended
        return
    stage = part_of_job(planned, plan.run_dir, machine, meet)
    ended = paths.ended(machine)
    try:
        refuse_other_version(plan.paths)  # the code may have been replaced while the job waited
        every = OmegaConf.load(plan.paths.config).get("log_every", RunSettings.log_every)
        with Display(every, quiet=machine > 0) as display:
            if machine == 0:
                look_beforehand(plan, display)
            elif not wait_until_looked(plan, paths):
                return
            run_stage(plan, stage, display)
    finally:
        leave_json(ended, {})
    if machine == 0 and all(is_done(plan.paths.stage(other.config.name)) for other in plan.stages):
        write_state(plan.paths, "done")


def _machine(launcher: LauncherSettings, number: str) -> int:
    """The number of this machine.

    Raises:
        LaunchError: It is not known, and there are several.
    """
    if launcher.nodes == 1:
        return 0
    if not (number.isascii() and number.isdigit() and int(number) < launcher.nodes):
        raise LaunchError(
            f"`launcher.nodes={launcher.nodes}`, and which of the machines this is was not said: `--machine={number}`",
            "the script of the job takes it from SLURM_NODEID, outside of `launcher.container`: let srun start it, or "
            "write it anew with `alignctl resume`",
        )
    return int(number)
