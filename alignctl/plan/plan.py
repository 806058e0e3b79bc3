"""Turns a checked config into what will be run. Pure: writes nothing, starts nothing. Torch-free."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.config.adapters import has_adapter
from alignctl.config.batches import rows_of_step
from alignctl.config.stages import StageConfig, stage_config
from alignctl.config.trl_fields import config_fields
from alignctl.data.sources import is_hub_id
from alignctl.methods.registry import methods
from alignctl.run.fingerprint import VERSION, input_files, stage_fingerprint
from alignctl.run.paths import RunPaths, StagePaths


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do."""

    config: StageConfig
    start: str
    """Where its weights come from: a folder, a Hub id, or `random weights`."""
    roles: dict[str, str]
    """The models it needs, the trained one first, and where the weights of each come from."""
    trained: str
    global_batch_size: int
    """Sequences (pairs for preferences) per optimizer step, on all processes together."""
    command: tuple[str, ...]
    """Starts its workers."""
    environment: dict[str, str]
    """Set for its worker on top of what is there."""
    output: str
    fingerprint: str
    inputs: dict[str, str]
    """Its local input files, and what each was known by (run/fingerprint.py)."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will do."""

    recipe: str
    run_dir: str
    stages: tuple[StagePlan, ...]

    @property
    def paths(self) -> RunPaths:
        return RunPaths(Path(self.run_dir))

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION} | dataclasses.asdict(self)


def make_plan(config: Mapping[str, Any], recipe: str, run_dir: Path) -> RunPlan:
    """Plans a checked config whose local paths are absolute."""
    paths = RunPaths(run_dir)
    stages: dict[str, StagePlan] = {}
    for name in config["stages"]:
        stage = stage_config(config, name)
        givers = (stage.start_from, *stage.roles_from.values(), stage.data.rows_from)
        upstream = [stages[other].fingerprint for other in givers if other]
        batch = rows_of_step(
            stage.trainer, config_fields(methods()[stage.method].config_class), stage.launcher.world_size
        )
        stages[name] = StagePlan(
            config=_with_rows(stage, paths),
            start=_start(stage, paths),
            roles={role: source for role in methods()[stage.method].roles if (source := _source(stage, role, paths))},
            trained="nothing" if methods()[stage.method].product == "rows" else _trained(stage.peft),
            global_batch_size=batch,
            command=stage_command(stage, run_dir),
            environment=stage_environment(stage),
            output=str(_product(stage, paths.stage(name))),
            fingerprint=stage_fingerprint(stage, upstream, batch),
            inputs=input_files(stage.inputs),
        )
    return RunPlan(recipe, str(run_dir), tuple(stages.values()))


def common_stages(plans: Sequence[RunPlan]) -> list[dict[str, RunPaths]]:
    """Of each plan the stages that a plan before it has, too, with the same result, and that run: SFT of a sweep over
    DPO's beta is the same in all points."""
    first: dict[str, RunPaths] = {}
    shared: list[dict[str, RunPaths]] = []
    for plan in plans:
        shared.append({})
        for stage in plan.stages:
            owner = first.setdefault(stage.fingerprint, plan.paths)
            if owner != plan.paths:
                shared[-1][stage.config.name] = owner
    return shared


def _with_rows(stage: StageConfig, paths: RunPaths) -> StageConfig:
    """A stage that reads the rows of another, with the file they will be in."""
    if not stage.data.rows_from:
        return stage
    file = paths.stage(stage.data.rows_from).rows.data
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=str(file)))


def _product(stage: StageConfig, folders: StagePaths) -> Path:
    if methods()[stage.method].product == "rows":
        return folders.rows.root
    return folders.adapter if stage.leaves_adapter else folders.model


def _start(stage: StageConfig, paths: RunPaths) -> str:
    if stage.start_from:
        return str(paths.stage(stage.start_from).model)
    return stage.model.path or "random weights"


def _source(stage: StageConfig, role: str, paths: RunPaths) -> str | None:
    """Where the weights of a role come from: what the stage names for it, else the weights it starts with. None for a
    reward model that is not named. A value model starts from the reward model where there is one; over a shared base
    both are an adapter."""
    if role in stage.roles_from:
        folders = paths.stage(stage.roles_from[role])
        return str(folders.adapter if stage.takes_adapter(role) else folders.model)
    if role in stage.role_paths:
        return stage.role_paths[role]
    trained = methods()[stage.method].trained
    reward_model = _source(stage, "reward_model", paths) if role == "value_model" else None
    return reward_model or (None if role == "reward_model" != trained else _start(stage, paths))


def _trained(peft: Mapping[str, Any]) -> str:
    if not has_adapter(peft):
        return "all weights"
    modules = peft.get("target_modules") or "the modules peft chooses"
    kind = "dora" if peft.get("use_dora") else peft["type"]
    return f"{kind} r={peft.get('r', 8)} on {', '.join(modules) if isinstance(modules, list) else modules}"


def stage_command(stage: StageConfig, run_dir: Path) -> tuple[str, ...]:
    """What starts a stage: on SLURM, on each machine of its job, whatever starts its workers there."""
    if stage.launcher.type == "slurm":
        return (stage.launcher.python or sys.executable, "-P", "-m", "alignctl", "node", str(run_dir), stage.name)
    return workers_command(stage, run_dir)


def workers_command(stage: StageConfig, run_dir: Path) -> tuple[str, ...]:
    """Starts the worker, or torchrun with as many as the launcher asks for on this machine."""
    python, launcher = (sys.executable, "-P", "-m"), stage.launcher
    if stage.distributed.type == "none":
        return (*python, "alignctl.worker", str(run_dir), stage.name)
    if launcher.nodes == 1:
        meet: tuple[str, ...] = ("--rdzv-endpoint=127.0.0.1:0",)
    else:
        meet = (
            f"--nnodes={launcher.nodes}", f"--node-rank={launcher.node_rank}",
            f"--rdzv-endpoint={launcher.rdzv_endpoint}", f"--rdzv-id={run_dir.name}-{stage.name}",
        )  # fmt: skip
    return (
        *python, "alignctl.agent", str(run_dir), stage.name, *meet, f"--nproc-per-node={launcher.processes_per_node}",
    )  # fmt: skip


def stage_environment(stage: StageConfig) -> dict[str, str]:
    """No telemetry; no look at the Hub where every input is on this machine and no curves go there; no module beside
    the user's files that hides one of ours; no GPU where processes on CPUs were asked for; and no ear for other
    machines where there are none."""
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not any(is_hub_id(path) for path in stage.inputs.values()) and not _shown_on_hub(stage):
        environment["HF_HUB_OFFLINE"] = "1"
    if stage.distributed.type != "none":
        environment["PYTHONSAFEPATH"] = "1"
        if stage.launcher.nodes == 1:
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if stage.launcher.processes:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def _shown_on_hub(stage: StageConfig) -> bool:
    """Whether curves go to a Space, of the stage's settings, or of the variable that Trackio takes for one."""
    if stage.trainer.get("trackio_space_id") or stage.trainer.get("trackio_bucket_id"):
        return True
    return "trackio" in stage.tracker.names and bool(os.environ.get("TRACKIO_SPACE_ID"))
