"""One stage with everything it was given: its own settings over those of the run. Torch-free, pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignctl.config.adapters import has_adapter
from alignctl.config.rewards import function_of
from alignctl.config.schema import (
    FUNCTION_KEYS,
    PATHS,
    ROLE_KEYS,
    SECTIONS,
    STAGE_KEYS,
    DistributedSettings,
    EvalSettings,
    LauncherSettings,
    ModelSettings,
    RunSettings,
    TrackerSettings,
    settings_of,
)
from alignctl.data.settings import DataSettings
from alignctl.data.sources import files_by_key
from alignctl.data.templates import template_file


@dataclass(frozen=True)
class StageConfig:
    """A stage, ready to be run."""

    name: str
    method: str
    start_from: str | None
    """The stage whose model this one starts from; None starts from `model`."""
    roles_from: dict[str, str]
    """Stages that give the models of other roles, as far as the stage names any."""
    role_paths: dict[str, str]
    """Folders or Hub ids of the models of other roles, as far as the stage names any."""
    seed: int
    model: ModelSettings
    data: DataSettings
    peft: dict[str, Any]
    eval: EvalSettings
    distributed: DistributedSettings
    launcher: LauncherSettings
    tracker: TrackerSettings
    rehearse: bool
    trainer: dict[str, Any]
    """Fields of the trainer's config class, under their own names."""
    taken_by: list[str] = dataclasses.field(default_factory=list)
    """Stages of the run that start from its model or take it for a role."""

    @property
    def leaves_adapter(self) -> bool:
        """Whether its product is an adapter, and no model."""
        return has_adapter(self.peft) and not self.model.merge

    def takes_adapter(self, role: str) -> bool:
        """Whether a role takes the adapter of an earlier stage, to be put on the base that it has already."""
        return role == "reward_model" and self.trainer.get("sharing") == "shared_base"

    @property
    def inputs(self) -> dict[str, str]:
        """Files, folders and Hub ids that the stage reads, by dotted key; what an earlier stage made is not there."""
        given = {f"model.{key}": getattr(self.model, key) for key in PATHS["model"]}
        for key in PATHS["data"]:
            given |= files_by_key(f"data.{key}", getattr(self.data, key))
        if template := self.model.chat_template:
            given["model.chat_template"] = str(template_file(template) or "")  # a text is no file
        if self.start_from:
            del given["model.path"], given["model.merge_into"]
        for name, path in (self.data.eval or {}).items():
            given |= files_by_key(f"data.eval.{name}", path)
        for number, entry in enumerate(self.data.mix or []):
            given |= files_by_key(f"data.mix.{number}", entry["path"])
        if self.data.rows_from:
            given = {key: path for key, path in given.items() if not key.startswith("data.path")}
        given |= self.role_paths
        for key in FUNCTION_KEYS:
            functions = [function_of(entry) or "" for entry in self.trainer.get(key) or []]
            files = [target.rpartition(":")[0] for target in functions]
            given |= {f"{key}.{number}": file for number, file in enumerate(files) if file.endswith(".py")}
        return {key: path for key, path in given.items() if path}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stage_config(config: Mapping[str, Any], name: str) -> StageConfig:
    """Builds the settings of one stage of a checked config."""
    stage = config[name]
    roles = {key: stage[key] for key in ROLE_KEYS if stage.get(key)}
    sections = {key: settings_of(cls, merged_section(config, name, key)) for key, cls in SECTIONS.items()}
    return StageConfig(
        name=name,
        method=stage["method"],
        start_from=stage.get("from"),
        roles_from={key: source for key, source in roles.items() if source in config["stages"]},
        role_paths={key: source for key, source in roles.items() if source not in config["stages"]},
        seed=config.get("seed", RunSettings.seed),
        peft=merged_section(config, name, "peft"),
        distributed=DistributedSettings(**config.get("distributed") or {}),
        launcher=LauncherSettings(**stage_launcher(config, name)),
        tracker=TrackerSettings(**config.get("tracker") or {}),
        rehearse=config.get("rehearse", RunSettings.rehearse),
        trainer={
            key: [value] if key in FUNCTION_KEYS and isinstance(value, str | Mapping) else value
            for key, value in stage.items()
            if key not in STAGE_KEYS
        },
        taken_by=[
            other
            for other in config["stages"]
            if name in [config[other].get(key) for key in ("from", *ROLE_KEYS)] and other != name
        ],
        **sections,
    )


# Keys that say which data set it is and what its columns mean: a stage that has a `path` or `from` of its own takes
# none of them from the run.
_DATA_IDENTITY = (
    "path", "from", "mix", "mix_by", "mix_stopping_strategy", "name", "revision", "split", "eval_path", "eval_split",
    "eval", "holds", "format", "columns", "template", "use",
)  # fmt: skip


def merged_section(config: Mapping[str, Any], stage: str, section: str) -> dict[str, Any]:
    """A section of a stage: the run's, overridden key by key by the stage's own.

    What belongs to one adapter or one data set says nothing about another: a stage with another `peft.type` starts that
    section anew, and one with its own `data.path` or `data.from` takes over only how rows are handled. What is not a
    mapping counts as empty; checks/ reports it.
    """
    common, own = _mapping(config.get(section)), _mapping(_mapping(config.get(stage)).get(section))
    if section == "peft" and own.get("type", common.get("type")) != common.get("type"):
        common = {}
    if section == "data" and names_rows(own):
        common = {key: value for key, value in common.items() if key not in _DATA_IDENTITY}
    return common | own


def names_rows(data: Mapping[str, Any]) -> bool:
    """Whether a section `data` says which rows are read."""
    return "path" in data or any(data.get(key) is not None for key in ("from", "mix"))


def stage_launcher(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The section `launcher` as one stage has it: the run's, overridden by `launcher.stages.STAGE`."""
    common = _mapping(config.get("launcher"))
    return {key: value for key, value in common.items() if key != "stages"} | _mapping(
        _mapping(common.get("stages")).get(stage)
    )


def first_stage(config: Mapping[str, Any], name: str) -> str:
    """Where the line of `from` that ends with a stage begins: its `model` is what all of them start from."""
    seen = [name]
    while (start := _mapping(config.get(seen[-1])).get("from")) in config and start not in seen:
        seen.append(start)
    return seen[-1]


def stage_names(config: Mapping[str, Any]) -> list[str]:
    """Every stage the config describes, whether `stages` names it or not."""
    return [key for key, value in config.items() if isinstance(value, Mapping) and "method" in value]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
