"""`alignctl node`, which SLURM jobs call: this machine's part of a stage. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import OmegaConf

from alignctl.cli.display import Display
from alignctl.config.schema import RunSettings
from alignctl.launch.beforehand import look_beforehand, wait_until_looked
from alignctl.launch.local import part_of_job, run_stage
from alignctl.plan.freeze import read_plan, refuse_other_version
from alignctl.run.paths import RunPaths
from alignctl.run.state import is_done, write_state


def node_command(run_dir: Path, stage_name: str, meet: str) -> None:
    """Runs it. Whatever comes of it, the job can see that this machine ended by itself."""
    plan = read_plan(RunPaths(run_dir))
    machine = int(os.environ.get("SLURM_NODEID", 0))
    planned = next(stage for stage in plan.stages if stage.config.name == stage_name)
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
        ended.parent.mkdir(parents=True, exist_ok=True)
        ended.touch()
    if machine == 0 and all(is_done(plan.paths.stage(other.config.name)) for other in plan.stages):
        write_state(plan.paths, "done")
