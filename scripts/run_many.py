"""Runs many requests one after another in the same processes: what tests and tables of many small runs need.

    python scripts/run_many.py JOBS.json
    torchrun --standalone --nproc-per-node=2 scripts/run_many.py JOBS.json

JOBS.json is a list of {"run_dir": ..., "arguments": [...]}. Where `continues` names another run directory, that run is
copied first and cut back to its oldest checkpoint, as if it had been killed there. What became of each is added to
JOBS.json.done, a line for each: {"run_dir": ..., "error": null or what was refused}. An error that is no refusal ends
the processes; what is in that file need not be run again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, read_request
from alignctl.methods.registry import methods, resolve
from alignctl.monitor.stopping import StopSignal
from alignctl.plan.freeze import absolute_paths, freeze
from alignctl.plan.plan import make_plan
from alignctl.run.checkpoints import complete_checkpoints
from alignctl.run.frozen import read_stage
from alignctl.run.paths import StagePaths
from alignctl.run.products import take_rows

RANK = int(os.environ.get("RANK", 0))


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        distributed.init_process_group("gloo")
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        error = run(Path(job["run_dir"]), job["arguments"], job.get("continues"))
        if RANK == 0:
            with Path(f"{jobs}.done").open("a", encoding="utf-8") as done:
                done.write(json.dumps({"run_dir": job["run_dir"], "error": error}) + "\n")


def run(run_dir: Path, arguments: list[str], continues: str | None) -> str | None:
    """Runs one request, as the command does in a process of its own. Returns what was refused."""
    request = read_request(arguments)
    config, problems = compose(request)
    if problems := problems + find_problems(config):
        return "; ".join(problem.message for problem in problems)
    plan = make_plan(absolute_paths(config), request.recipe.name, run_dir)
    if RANK == 0:
        if continues:
            shutil.copytree(continues, run_dir)
            for name in config["stages"]:
                cut_back(plan.paths.stage(name))
        freeze(plan, config, sys.argv)
    _meet()
    _forget()
    for name in config["stages"]:
        stage, weights = read_stage(plan.paths, name)
        if RANK == 0:
            take_rows(stage, plan.paths.stage(name))
        _meet()
        resolve(methods()[stage.method].stage_function)(stage, weights, plan.paths.stage(name), StopSignal())
        _meet()
    return None


def cut_back(stage: StagePaths) -> None:
    """Leaves of a finished stage what it had when its oldest checkpoint was written."""
    for checkpoint in complete_checkpoints(stage.checkpoints)[1:]:
        shutil.rmtree(checkpoint.path)
    for folder in (stage.model, stage.adapter):
        shutil.rmtree(folder, ignore_errors=True)
    stage.result.unlink()


def _forget() -> None:
    """Forgets what is kept of the run before, in the environment, too: how its model was divided."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_USE_")]:
        del os.environ[name]


def _meet() -> None:
    if distributed.is_initialized():
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as workers end: library threads may bring down an interpreter that ends beside them
