"""Starts the process that rehearses a stage as one of many (alone/), and reads what it saw. Torch-free."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from alignctl.errors import AlignctlError
from alignctl.launch.child import ChildFailed, as_error, ask
from alignctl.plan.freeze import freeze
from alignctl.plan.memory import Place
from alignctl.plan.plan import RunPlan

_SAID = 9000  # characters of what a process said last


def temporary_run() -> tempfile.TemporaryDirectory:
    """A folder for a run that nobody keeps."""
    return tempfile.TemporaryDirectory(prefix="alignctl-rehearse-")


def run_alone(plan: RunPlan, config: dict[str, Any], place: Place, tokens: int, numberless: bool) -> dict[str, Any]:
    """What a process sees that rehearses the stage of a plan with one.

    Raises:
        AlignctlError: It cannot, or dies.
    """
    root, [stage] = Path(plan.run_dir), [one.config for one in plan.stages]
    freeze(plan, config, sys.argv)
    local = stage.launcher.processes_per_node
    environment = {
        "RANK": str(place.rank), "WORLD_SIZE": str(place.processes),
        "LOCAL_RANK": str(place.rank % local), "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ALIGNCTL_CACHE": str(root / "cache"), "HF_DATASETS_CACHE": str(root / "datasets"),
    }  # fmt: skip
    if place.processes == 1:
        environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
    kind = "numberless" if numberless else "numbers"
    try:
        seen = ask("alignctl.alone", root, [str(root), stage.name, str(tokens), kind], environment)
    except ChildFailed as error:
        said = str(error)[-_SAID:]
        raise AlignctlError(f"the process that rehearses `{stage.name}` failed; it said last:\n{said}") from error
    if problems := seen.get("problems"):
        raise as_error(problems)
    return seen
