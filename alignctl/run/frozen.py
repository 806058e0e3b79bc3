"""Reads a run directory back as it was frozen (plan/freeze.py writes it). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.config.secrets import filled_in, take_note
from alignctl.config.stages import StageConfig
from alignctl.errors import RequestError
from alignctl.methods.registry import methods
from alignctl.run.files import read_record
from alignctl.run.forms import PLAN, SECTIONS
from alignctl.run.paths import RunPaths


def read_frozen(paths: RunPaths) -> dict[str, Any]:
    """The content of plan.json.

    Raises:
        RequestError: There is no run, or the file is damaged.
    """
    plan = read_record(paths.plan, PLAN)
    if plan is None:
        raise RequestError(
            f"{paths.root} is not a run directory", "runs are folders below runs/: `alignctl status --all`"
        )
    names = [stage["config"]["name"] for stage in plan["stages"]]
    known = all(stage["config"]["method"] in methods() for stage in plan["stages"])
    if not names or not known or not all(name.isidentifier() for name in names):
        raise RequestError(
            f"{paths.plan} is damaged, or of another alignctl: its stages are {', '.join(names) or 'none'}",
            "put it back as it was, or begin anew with another `run_dir`",
        )
    return plan


def read_stage(paths: RunPaths, name: str) -> tuple[StageConfig, dict[str, str | None]]:
    """A stage, secrets filled in from the environment, and where the weights of each of its roles come from (None:
    random).

    Raises:
        RequestError: A variable that it takes is not set, or its settings are none of this alignctl's.
    """
    stage = next(stage for stage in read_frozen(paths)["stages"] if stage["config"]["name"] == name)
    take_note(stage["config"])
    try:
        # What the launcher takes is for the script of a job, whose worker need not have it.
        given = {key: part if key == "launcher" else filled_in(part) for key, part in stage["config"].items()}
    except KeyError as error:
        raise RequestError(
            f"`{name}` takes the variable {error.args[0]} of the environment, which is not set here",
            f"export {error.args[0]}=...",
        ) from error
    config = as_stage(paths, given)
    from_scratch = config.start_from is None and config.model.path is None
    random = stage["start"] if from_scratch else None
    return config, {role: None if source == random else source for role, source in stage["roles"].items()}


def as_stage(paths: RunPaths, config: Mapping[str, Any]) -> StageConfig:
    """The settings of a stage, of those in plan.json.

    Raises:
        RequestError: They are none of this alignctl's.
    """
    given = dict(config)
    if "report_to" in given:  # as it was called before it was a section
        given["tracker"] = {"report_to": given.pop("report_to")}
    try:
        return StageConfig(**given | {key: settings(**given[key]) for key, settings in SECTIONS.items()})
    except (TypeError, KeyError) as error:
        raise RequestError(
            f"{paths.plan} is of another alignctl, or damaged: {error}",
            "go on with the alignctl that began it, or begin anew with another `run_dir`",
        ) from error


def frozen_version(paths: RunPaths) -> int:
    """The version (run/fingerprint.py) under which a run was begun."""
    return read_frozen(paths).get("version", 1)


def frozen_fingerprints(paths: RunPaths) -> dict[str, str]:
    """Stages of a run directory and their fingerprints, in order; empty where there is no run."""
    plan = read_frozen(paths) if paths.plan.exists() else {"stages": []}
    return {stage["config"]["name"]: stage["fingerprint"] for stage in plan["stages"]}
