"""Reads a run directory back as it was frozen (plan/freeze.py writes it). Torch-free."""

from __future__ import annotations

from alignctl.config.schema import DistributedSettings, EvalSettings, LauncherSettings, ModelSettings
from alignctl.config.stages import StageConfig
from alignctl.data.settings import DataSettings
from alignctl.run.files import read_json
from alignctl.run.paths import RunPaths


def read_stage(paths: RunPaths, name: str) -> tuple[StageConfig, dict[str, str | None]]:
    """A stage, and where the weights of each of its roles come from (None: random)."""
    stage = next(stage for stage in read_json(paths.plan)["stages"] if stage["config"]["name"] == name)
    config = StageConfig(
        **stage["config"]
        | {
            "model": ModelSettings(**stage["config"]["model"]),
            "data": DataSettings(**stage["config"]["data"]),
            "eval": EvalSettings(**stage["config"]["eval"]),
            "distributed": DistributedSettings(**stage["config"]["distributed"]),
            "launcher": LauncherSettings(**stage["config"]["launcher"]),
        }
    )
    from_scratch = config.start_from is None and config.model.path is None
    random = stage["start"] if from_scratch else None
    return config, {role: None if source == random else source for role, source in stage["roles"].items()}


def frozen_version(paths: RunPaths) -> int:
    """The version (run/fingerprint.py) under which a run was begun."""
    return read_json(paths.plan).get("version", 1)


def frozen_fingerprints(paths: RunPaths) -> dict[str, str]:
    """Stages of a run directory and their fingerprints, in order; empty where there is no run."""
    plan = read_json(paths.plan) or {"stages": []}
    return {stage["config"]["name"]: stage["fingerprint"] for stage in plan["stages"]}
