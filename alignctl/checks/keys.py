"""Checks of keys, their types, and the order of stages. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignctl.checks.trackers import check_trackers
from alignctl.checks.values import check_choice, check_trainer_value, check_value, method_of
from alignctl.config.adapters import has_adapter
from alignctl.config.flat import flatten
from alignctl.config.schema import (
    MISSING,
    PEFT_CLASSES,
    RESERVED_NAMES,
    ROLE_KEYS,
    SECTIONS,
    STAGE_KEYS,
    DistributedSettings,
    LauncherSettings,
    RunSettings,
    TrackerSettings,
    annotations,
)
from alignctl.config.secrets import PATH_KEYS, is_secret, looks_secret, variables
from alignctl.config.stages import merged_section, stage_names
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.data.settings import RENAMED, DataSettings
from alignctl.errors import Problem
from alignctl.methods.registry import Method, methods

_MOST_LETTERS = 100  # of the name of a stage, which is that of a folder
_TOP_SECTIONS = SECTIONS | {
    "tracker": TrackerSettings, "distributed": DistributedSettings, "launcher": LauncherSettings,
}  # fmt: skip


def check_top_level(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys and types outside the stages, and whether there is anything to run."""
    known = annotations(RunSettings)
    names = stage_names(config)
    for key, value in config.items():
        if key in names:
            if key in RESERVED_NAMES or key in known or not key.isidentifier() or len(key) > _MOST_LETTERS:
                yield Problem(
                    f"`{key}` cannot be the name of a stage", "use letters, digits and `_`, and no key of a run"
                )
        elif key not in known:
            stages = [name for name in names if config[name]["method"] == key]
            hint = f"the stage with the method `{key}` is called `{stages[0]}`" if stages else None
            hint = hint or did_you_mean(key, [*known, *names])
            if isinstance(value, Mapping):
                hint = hint or "a stage has the key `method`"
            yield Problem(f"unknown key `{key}`", hint)
        elif key == "peft":
            yield from _peft("peft", value)
        elif key in _TOP_SECTIONS:
            yield from _section(key, value, _TOP_SECTIONS[key])
        else:
            yield from check_value(key, value, known[key])
    if not config.get("stages") or config.get("stages") == MISSING:
        listed = f"stages of this recipe: {', '.join(names)}" if names else "name them: `stages: [dpo]`"
        yield Problem("`stages` is empty: there is nothing to run", listed)
    yield from check_trackers(config)


def check_secrets(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that are secret: written out, they would be masked in the run directory, and the worker would miss them;
    taken from the environment, they have to be there, and to be of use where nothing is shown or written."""
    for key, value in flatten(config).items():
        named = sorted(variables(value))
        if any(map(looks_secret, _held(value))) or (is_secret(key) and value and not named):
            yield Problem(
                f"`{key}` holds what looks like a token",
                f"put it in the environment, for example HF_TOKEN, and write `'{key}=${{oc.env:HF_TOKEN}}'`",
            )
        told = key.startswith("tracker.") or _on_command_lines(key)
        if named and (key.rpartition(".")[2] in PATH_KEYS or told):
            yield Problem(
                f"`{key}` is shown and written, and the variable {named[0]} is secret by its name",
                "take a variable of another name"
                + (", or export it in `launcher.setup`" if _on_command_lines(key) else ""),
            )
        for name in named:
            if name not in os.environ:
                yield Problem(f"`{key}`: the environment has no variable {name}", f"export {name}=...")


def _on_command_lines(key: str) -> bool:
    """Whether a setting becomes words of a command, which everybody on the machine may see; `setup`, also that of
    `launcher.stages.STAGE`, becomes a script."""
    return key.startswith("launcher.") and key.rpartition(".")[2] != "setup"


def _held(value: Any) -> Iterator[Any]:
    """What a value is, or what its lists and mappings hold."""
    if not isinstance(value, list | Mapping):
        yield value
        return
    for one in value.values() if isinstance(value, Mapping) else value:
        yield from _held(one)


def check_stage(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Keys and types of one stage."""
    stage = config[name]
    method = method_of(config, name)
    if method is None:
        yield from check_choice(f"{name}.method", stage["method"], methods())
        return
    fields = config_fields(method.config_class)
    offered = [
        *(key for key in STAGE_KEYS if key not in ROLE_KEYS or key in method.roles[1:]),
        *(key for key in fields if key not in method.owned_fields),
    ]
    for key, value in stage.items():
        where = f"{name}.{key}"
        if key in SECTIONS:
            yield from _section(where, value, SECTIONS[key])
        elif key == "peft":
            yield from _peft(where, merged_section(config, name, "peft") if isinstance(value, Mapping) else value)
        elif key in ROLE_KEYS:
            yield from _role(where, value, key, method)
        elif key in method.owned_fields:
            yield Problem(f"`{where}` is not a stage's to set", method.owned_fields[key])
        elif key in fields:
            yield from check_trainer_value(where, value, fields[key])
        elif key == "from":
            yield from check_value(where, value, "str | None")
        elif key not in STAGE_KEYS:
            yield Problem(f"unknown key `{where}`", did_you_mean(key, offered, prefix=f"{name}."))


def _role(where: str, value: Any, role: str, method: Method) -> Iterator[Problem]:
    if role not in method.roles[1:]:
        if value is not None:
            no = role.replace("_", " ")
            yield Problem(
                f"`{where}` would have no effect: the method {method.name} has no {no}", f"take `{where}` out"
            )
    else:
        yield from check_value(where, value, "str | None")


def _section(where: str, section: Any, settings: type) -> Iterator[Problem]:
    """Keys and types of one of alignctl's own sections."""
    if not isinstance(section, Mapping):
        key = where.rpartition(".")[2]
        hint = f"to choose an option of the group: `{key}@{where}={section}`" if isinstance(section, str) else None
        yield Problem(f"`{where}` must be a mapping, got `{section}`", hint, where)
        return
    known = annotations(settings)
    for key, value in section.items():
        if settings is DataSettings and key in RENAMED:  # renamed where it is there alone
            yield Problem(
                f"`{where}.{key}` is the former name of `{where}.{RENAMED[key]}`, which is set, too",
                "take one of them out",
            )
        elif key not in known:
            yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, known, prefix=f"{where}."))
        elif value != MISSING:
            yield from check_value(f"{where}.{key}", value, known[key])


def _peft(where: str, section: Any) -> Iterator[Problem]:
    if not isinstance(section, Mapping):
        yield Problem(f"`{where}` must be a mapping, got `{section}`", None, where)
        return
    kind = section.get("type", "none")
    if problems := list(check_choice(f"{where}.type", kind, PEFT_CLASSES)):
        yield from problems
        return
    given = {key: value for key, value in section.items() if key != "type"}
    if not has_adapter(section):
        known = {field for one in PEFT_CLASSES.values() if one for field in config_fields(one)}
        unused = [key for key in given if key in known]
        yield from (_unknown(where, key, known) for key in given if key not in known)
        if unused:
            keys = ", ".join(f"`{where}.{key}`" for key in unused)
            yield Problem(
                f"{keys} would have no effect: `{where}.type` is none", f"choose an adapter: `{where}.type=lora`"
            )
        return
    fields = config_fields(PEFT_CLASSES[kind])
    for key, value in given.items():
        if key not in fields:
            yield _unknown(where, key, fields)
        else:
            yield from check_value(f"{where}.{key}", value, fields[key].annotation)


def _unknown(where: str, key: str, known: Iterable[str]) -> Problem:
    return Problem(f"unknown key `{where}.{key}`", did_you_mean(key, known, prefix=f"{where}."))
