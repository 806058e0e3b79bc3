"""What the files of a run directory hold, as far as commands look at it (config/forms.py says how it is written).
Torch-free."""

from __future__ import annotations

import dataclasses
from typing import Any

from alignctl.config.schema import (
    DistributedSettings,
    EvalSettings,
    LauncherSettings,
    ModelSettings,
    TrackerSettings,
)
from alignctl.config.stages import StageConfig
from alignctl.data.settings import DataSettings

SECTIONS = {
    "model": ModelSettings, "data": DataSettings, "eval": EvalSettings, "distributed": DistributedSettings,
    "launcher": LauncherSettings, "tracker": TrackerSettings,
}  # fmt: skip
"""Of a stage, with the class of the settings in each."""


def _of(settings: type) -> dict[str, Any]:
    """The fields of a settings class, of which a later version may have more."""
    return {f"{one.name}?": one.type for one in dataclasses.fields(settings)}


_STAGE = {
    key: _of(settings) if (settings := SECTIONS.get(key.rstrip("?"))) else annotation
    for key, annotation in _of(StageConfig).items()
} | {"name": "str", "method": "str", "trainer": "dict"}  # fmt: skip

PLAN = {
    "recipe": "str", "run_dir": "str", "version?": "int", "number?": "int",
    "stages": [{
        "config": _STAGE, "start": "str", "roles": "dict[str, str]", "trained": "str", "global_batch_size": "int",
        "command": "list[str]", "environment": "dict[str, str]", "output": "str", "fingerprint": "str",
        "inputs?": "dict[str, str]",
    }],
}  # fmt: skip
STATUS = {
    "state": "str", "host?": "str", "pid?": "int",
    "stages": {"*": {
        "state": "str", "attempts?": "int", "error?": "str",
        "job?": {"id": "str", "log": "str", "defaults?": "dict[str, str]"},
    }},
}  # fmt: skip
PROVENANCE = [{"alignctl?": "str"}]
TRACKERS = {"*": {"*": "str"}}
_TRAINED = {
    "step?": "int", "max_steps?": "int", "metrics?": "dict[str, float | None]", "seconds_left?": "float",
    "tokens_per_s?": "float",
}  # fmt: skip
PROGRESS = _TRAINED | {"phase": "str", "notices?": "list[str]", "trained?": _TRAINED}
RESULT = {
    "before?": "dict[str, float | None]",
    "after?": "dict[str, float | None]",
    "win_rate?": "float",
    "certainty?": {
        "*": {
            "n": "int",
            "before?": "list[float] | None",
            "after?": "list[float] | None",
            "within_noise?": "bool | None",
        }
    },
    "product?": "str",
}
LEDGERS = {"*": {
    "source": "str | list[str]", "read": "int", "kept": "int", "held_out": "int", "lost": "int", "partly": "int",
    "ties": "int", "cut": "int", "num_skipped": "int", "skipped": "dict",
    "reasons": [{"what": "Literal['skipped', 'lost', 'partly', 'ties', 'cut']", "why": "str", "count": "int",
                 "first": [{"row": "int"}]}],
    "parts?": [{"source": "str", "rows": "int", "share": "float", "tokens?": "int"}],
}}  # fmt: skip
FILES = {"*": {"bytes": "int", "sha256": "str"}}
CHECKED = {"*": {"bytes": "int", "sha256": "str", "modified_ns": "int"}}
INPUTS = {"rows_from": "str", "files": FILES}
PRODUCT = {"files": FILES}
ROWS = PRODUCT | {
    "kind": "str",
    "count": "int",
    "columns": "list[str]",
    "stage": "str",
    "method": "str",
    "alignctl": "str",
}
CHECKPOINT = {"step": "int", "kind": {"processes": "int", "zero_stage": "int", "fsdp?": "bool"}, "files": FILES}
