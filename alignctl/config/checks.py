"""Finds everything that is wrong with a composed config, before anything heavy is imported. Torch-free.

Each check looks at one thing and yields problems; `find_problems` runs them all, so several mistakes are reported
together. Nothing here changes the config.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.config.flat import flatten
from alignctl.config.schema import (
    MINIMUM,
    MISSING,
    PEFT_CLASSES,
    SECTIONS,
    STAGE_KEYS,
    RunSettings,
    TrackerSettings,
    annotations,
)
from alignctl.config.secrets import MASK, is_secret, looks_secret
from alignctl.config.stages import merged_section, stage_names
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import Field, config_fields, enum_values
from alignctl.config.types import type_error
from alignctl.data.formats import FORMATS, detect_format
from alignctl.data.sources import BUILTIN_SOURCES, FILE_SUFFIXES, is_hub_id, peek_rows
from alignctl.errors import Problem
from alignctl.evaluate.judges import JUDGES
from alignctl.methods.registry import Method, methods
from alignctl.run.paths import RESERVED_NAMES

_TOP_SECTIONS = SECTIONS | {"tracker": TrackerSettings}
# Reporting integrations of transformers and the packages they need.
_TRACKERS = {
    "none": None, "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
# Numbers of a trainer that must be greater than 0.
_POSITIVE = (
    "learning_rate", "beta", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "num_train_epochs", "save_steps", "logging_steps", "eval_steps",
)  # fmt: skip


def find_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Runs every check on a composed config; an empty list means that it can be planned."""
    problems = list(_top_level(config)) + list(_secrets(config))
    names = stage_names(config)
    for name in names:
        problems += _stage(config, name)
    problems += _stage_order(config, names)
    for name in _run_stages(config, names):
        problems += _model(config, name)
        problems += _data(config, name)
        problems += _combinations(config, name)
    problems += _unused(config, _run_stages(config, names))
    return list(dict.fromkeys(problems))


def _run_stages(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """The stages that will run, as far as they can be checked further."""
    stages = config.get("stages")
    wanted = [name for name in stages if isinstance(name, str)] if isinstance(stages, list) else []
    return [name for name in wanted if name in names and _method(config, name)]


def _method(config: Mapping[str, Any], name: str) -> Method | None:
    method = config[name]["method"]
    return methods().get(method) if isinstance(method, str) else None


def _secrets(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that look like a token: they would be masked in the run directory, and the worker would miss them."""
    for key, value in flatten(config).items():
        if looks_secret(value):
            yield Problem(f"`{key}` holds what looks like a token", "put it in the environment, for example HF_TOKEN")


def _choice(where: str, value: Any, options: Iterable[str | None]) -> Iterator[Problem]:
    """Whether a value is one of some names."""
    names = [name for name in options if name]
    if value not in names:
        yield Problem(f"unknown `{where}={value}`", did_you_mean(value, names, prefix=f"{where}="))


def _top_level(config: Mapping[str, Any]) -> Iterator[Problem]:
    known = annotations(RunSettings)
    names = stage_names(config)
    for key, value in config.items():
        if key in names:
            if key in RESERVED_NAMES or not key.isidentifier():
                yield Problem(f"`{key}` cannot be the name of a stage", "use letters, digits and `_`")
        elif key not in known:
            hint = did_you_mean(key, [*known, *names])
            if isinstance(value, Mapping):
                hint = hint or "a stage has the key `method`"
            yield Problem(f"unknown key `{key}`", hint)
        elif key == "peft":
            yield from _peft("peft", value)
        elif key in _TOP_SECTIONS:
            yield from _section(key, value, _TOP_SECTIONS[key])
        else:
            yield from _value(key, value, known[key])
    if not config.get("stages") or config.get("stages") == MISSING:
        listed = f"stages of this recipe: {', '.join(names)}" if names else "name them: `stages: [dpo]`"
        yield Problem("`stages` is empty: there is nothing to run", listed)
    if isinstance(config.get("run_dir"), str):
        yield from _run_dir(config["run_dir"])
    tracker = config.get("tracker")
    report_to = tracker.get("report_to", "none") if isinstance(tracker, Mapping) else "none"
    yield from _choice("tracker.report_to", report_to, _TRACKERS)
    package = _TRACKERS.get(report_to) if isinstance(report_to, str) else None
    if package and importlib.util.find_spec(package) is None:
        yield Problem(f"`tracker.report_to={report_to}` needs the package `{package}`", f"pip install {package}")


def _run_dir(path: str) -> Iterator[Problem]:
    """Whether a folder is there or can be made."""
    place = Path(path).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Problem(f"`run_dir={path}`: {place} is not a folder that can be written to")


def _section(where: str, section: Any, settings: type) -> Iterator[Problem]:
    """Keys and types of one of alignctl's own sections."""
    if not isinstance(section, Mapping):
        key = where.rpartition(".")[2]
        hint = f"to choose an option of the group: `{key}@{where}={section}`" if isinstance(section, str) else None
        yield Problem(f"`{where}` must be a mapping, got `{section}`", hint)
        return
    known = annotations(settings)
    for key, value in section.items():
        if key not in known:
            yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, known, prefix=f"{where}."))
        elif value != MISSING:
            yield from _value(f"{where}.{key}", value, known[key])


def _peft(where: str, section: Any) -> Iterator[Problem]:
    if not isinstance(section, Mapping):
        yield Problem(f"`{where}` must be a mapping, got `{section}`")
        return
    kind = section.get("type", "none")
    if problems := list(_choice(f"{where}.type", kind, PEFT_CLASSES)):
        yield from problems
        return
    given = {key: value for key, value in section.items() if key != "type"}
    config_class = PEFT_CLASSES[kind]
    if config_class is None:
        if given:
            keys = ", ".join(f"`{where}.{key}`" for key in given)
            yield Problem(
                f"{keys} would have no effect: `{where}.type` is none", f"choose an adapter: `{where}.type=lora`"
            )
        return
    fields = config_fields(config_class)
    for key, value in given.items():
        if key not in fields:
            yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, fields, prefix=f"{where}."))
        else:
            yield from _value(f"{where}.{key}", value, fields[key].annotation)


def _stage(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Keys and types of one stage."""
    stage = config[name]
    method = _method(config, name)
    if method is None:
        yield from _choice(f"{name}.method", stage["method"], methods())
        return
    fields = config_fields(method.config_class)
    offered = [*STAGE_KEYS, *(key for key in fields if key not in method.owned_fields)]
    for key, value in stage.items():
        where = f"{name}.{key}"
        if key in SECTIONS:
            yield from _section(where, value, SECTIONS[key])
        elif key == "peft":
            yield from _peft(where, merged_section(config, name, "peft") if isinstance(value, Mapping) else value)
        elif key in method.owned_fields:
            yield Problem(f"`{where}` is not a stage's to set", method.owned_fields[key])
        elif key in fields:
            yield from _trainer_value(where, value, fields[key])
        elif key not in STAGE_KEYS:
            yield Problem(f"unknown key `{where}`", did_you_mean(key, offered, prefix=f"{name}."))


def _value(where: str, value: Any, annotation: str) -> Iterator[Problem]:
    """Whether a value is there and of its type."""
    if value == MISSING:
        yield Problem(f"`{where}` must be given", f"add `{where}=...`")
    elif expected := type_error(value, annotation, enum_values):
        hint = None
        if "text" in expected and isinstance(value, (int, float)):
            hint = f"""quote it to make it text: `'{where}="{value}"'`"""
        shown = MASK if is_secret(where) else _shown(value)
        yield Problem(f"`{where}` must be {expected}, got `{shown}`", hint)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(f"`{where}` must be a finite number, got `{value}`")
    else:
        least = MINIMUM.get(".".join(where.split(".")[-2:]))
        if least is not None and value is not None and value < least:
            yield Problem(f"`{where}` must be at least {least}, got `{value}`")


def _trainer_value(where: str, value: Any, field: Field) -> Iterator[Problem]:
    """Type of a trainer's field, and whether the value is among those its documentation names."""
    # TRL takes a single value where a list is annotated.
    items = [value] if field.annotation.startswith("list[") and not isinstance(value, (list, type(None))) else value
    if any(_value(where, items, field.annotation)):
        yield from _value(where, value, field.annotation)
    elif field.choices:
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, str) and item not in field.choices:
                yield Problem(f"`{where}` has no value `{item}`", did_you_mean(item, field.choices, f"{where}="))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _stage_order(config: Mapping[str, Any], names: list[str]) -> Iterator[Problem]:
    """Whether every stage exists, runs once, and starts from one that runs before it."""
    stages = config.get("stages")
    if not isinstance(stages, list) or not all(isinstance(name, str) for name in stages):
        return
    for position, name in enumerate(stages):
        if name not in names:
            yield Problem(f"`stages` names `{name}`, which is not a stage of this recipe", did_you_mean(name, names))
            continue
        if name in stages[:position]:
            yield Problem(f"`stages` names `{name}` twice")
        start = config[name].get("from")
        if start is None:
            continue
        if start == name:
            yield Problem(f"`{name}.from={start}`: a stage cannot start from itself")
        elif start not in stages:
            hint = f"add it to `stages`, or start from `model` with `{name}.from=null`"
            near = did_you_mean(str(start), stages, prefix=f"{name}.from=")
            yield Problem(
                f"`{name}.from={start}`, but `{start}` is not in `stages` ({', '.join(stages)})",
                near if near and near.startswith("did") else hint,
            )
        elif start not in stages[:position]:
            yield Problem(
                f"`{name}.from={start}`, but `{start}` runs after `{name}`", f"put `{start}` first in `stages`"
            )


def _model(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    model = merged_section(config, name, "model")
    for key in ("chat_template", "tokenizer"):
        given = model.get(key)
        if (
            isinstance(given, str)
            and not Path(given).expanduser().exists()
            and not (key == "tokenizer" and is_hub_id(given))
        ):
            yield Problem(f"`model.{key}={given}`: there is no such file or folder")
    own = config[name].get("model")
    own = own if isinstance(own, Mapping) else {}
    if config[name].get("from") is not None:
        for key in ("path", "revision", "scratch"):
            if own.get(key) is not None:
                start = config[name]["from"]
                yield Problem(
                    f"`{name}.model.{key}` would have no effect: `{name}` starts from the model of `{start}`",
                    f"set `{name}.from=null` to start from a model of its own",
                )
        return
    path, scratch = model.get("path"), model.get("scratch")
    where = f"{name}.model.path" if "path" in own else "model.path"
    if path == MISSING:
        yield Problem(f"`{where}` must be given: a checkpoint folder or a Hub id", f"add `{where}=...`")
    elif path is None and scratch is None:
        yield Problem(f"stage `{name}` has no model to start from", f"give `{where}=...`")
    elif path is not None and scratch is not None:
        yield Problem(f"`{where}` and `model.scratch` exclude each other", "set one of them to null")
    elif isinstance(path, str):
        yield from _checkpoint(where, path)
    elif isinstance(scratch, Mapping):
        yield from _scratch(scratch)


def _checkpoint(where: str, path: str) -> Iterator[Problem]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield Problem(f"`{where}={path}`: the folder has no config.json, so it is not a checkpoint")
    elif not is_hub_id(path):
        yield Problem(f"`{where}={path}`: there is no such folder", "a Hub id has the form `owner/name`")


def _scratch(scratch: Mapping[str, Any]) -> Iterator[Problem]:
    known = {"vocab_size": "int", "config": "dict"}
    for key in scratch:
        if key not in known:
            yield Problem(f"unknown key `model.scratch.{key}`", did_you_mean(key, known, prefix="model.scratch."))
    for key, annotation in known.items():
        yield from _value(f"model.scratch.{key}", scratch.get(key, MISSING), annotation)
    config = scratch.get("config")
    if isinstance(config, Mapping) and "model_type" not in config:
        yield Problem("`model.scratch.config.model_type` must be given", "for example `llama`")


def _data(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    method = _method(config, name)
    assert method is not None
    data = merged_section(config, name, "data")
    own = config[name].get("data")
    where = f"{name}.data" if isinstance(own, Mapping) and "path" in own else "data"
    if data.get("path", MISSING) in (MISSING, None):
        yield Problem(f"`{where}.path` must be given: a file or a Hub id", f"add `{where}.path=...`")
    if data.get("eval_path") and data.get("eval_split"):
        yield Problem(f"`{where}.eval_path` and `{where}.eval_split` exclude each other")
    row_format = data.get("format", "auto")
    if problems := list(_choice(f"{where}.format", row_format, ["auto", *FORMATS])):
        yield from problems
        return
    for key in ("path", "eval_path"):
        if isinstance(data.get(key), str) and data[key] != MISSING:
            yield from _rows(f"{where}.{key}", data[key], row_format, method)
    if data.get("eval_split") and isinstance(data.get("path"), str) and not is_hub_id(data["path"]):
        yield Problem(f"`{where}.eval_split` is for Hub data sets", f"give the held-out file as `{where}.eval_path`")


def _rows(where: str, path: str, row_format: str, method: Method) -> Iterator[Problem]:
    """Whether a source of rows exists and its first row suits the method."""
    if path in BUILTIN_SOURCES or is_hub_id(path):
        return
    file = Path(path).expanduser()
    if path.startswith("builtin:"):
        yield Problem(f"unknown `{where}={path}`", did_you_mean(path, BUILTIN_SOURCES))
    elif not file.is_file():
        yield Problem(f"`{where}={path}`: there is no such file", "a Hub id has the form `owner/name`")
    elif file.suffix not in FILE_SUFFIXES:
        yield Problem(f"`{where}={path}`: cannot read `{file.suffix or file.name}`", f"use {', '.join(FILE_SUFFIXES)}")
    else:
        try:
            if rows := peek_rows(file):
                detect_format(rows, method.data_kind, row_format)
        except ValueError as error:
            yield Problem(f"`{where}={path}`: {error}")


def _combinations(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Settings that exclude each other, or of which one would have no effect."""
    stage = config[name]
    peft = merged_section(config, name, "peft")
    method = _method(config, name)
    assert method is not None
    default = config_fields(method.config_class).get("disable_dropout")
    disable_dropout = stage.get("disable_dropout", default.default if default else False)
    if stage.get("bf16") and stage.get("fp16"):
        yield Problem(f"`{name}.bf16` and `{name}.fp16` exclude each other", f"set `{name}.fp16=false`")
    if peft.get("lora_dropout") and disable_dropout:
        yield Problem(
            f"`peft.lora_dropout={peft['lora_dropout']}` would have no effect: `{name}.disable_dropout` is true",
            f"set `{name}.disable_dropout=false`, or `peft.lora_dropout=0`",
        )
    if stage.get("load_best_model_at_end") and stage.get("eval_strategy", "no") == "no":
        yield Problem(
            f"`{name}.load_best_model_at_end` needs evaluations to compare", f"set `{name}.eval_strategy=steps`"
        )
    weights, losses = stage.get("loss_weights"), stage.get("loss_type")
    if isinstance(weights, list) and isinstance(losses, list) and len(weights) != len(losses):
        yield Problem(f"`{name}.loss_weights` has {len(weights)} values for {len(losses)} in `{name}.loss_type`")
    for key in _POSITIVE:
        value = stage.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            yield Problem(f"`{name}.{key}` must be greater than 0, got `{value}`")
    settings = merged_section(config, name, "eval")
    temperature, judge = settings.get("temperature", 1.0), settings.get("judge")
    if isinstance(temperature, (int, float)) and temperature <= 0:
        yield Problem(f"`eval.temperature` must be greater than 0, got `{temperature}`")
    if judge is not None:
        problems = list(_choice("eval.judge", judge, JUDGES))
        yield from problems
        source = f"builtin:{judge}"
        data = merged_section(config, name, "data")
        if not problems and (data.get("eval_path") or data.get("path")) != source:
            yield Problem(f"`eval.judge={judge}` can only judge prompts of `{source}`", "set `eval.judge=null`")
    yield from _length(config, name)


def _length(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether sequences fit into the model, as far as its config is on this machine."""
    start = name
    while isinstance(config.get(start), Mapping) and (config[start].get("from") in config):
        start = config[start]["from"]
        if start == name:
            return
    model = merged_section(config, start, "model")
    described: Any = None
    if isinstance(model.get("scratch"), Mapping):
        described = model["scratch"].get("config")
    elif isinstance(model.get("path"), str):
        try:
            described = json.loads((Path(model["path"]).expanduser() / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
    limit = described.get("max_position_embeddings") if isinstance(described, Mapping) else None
    wanted = config[name].get("max_length")
    if isinstance(limit, int) and isinstance(wanted, int) and wanted > limit:
        yield Problem(
            f"`{name}.max_length={wanted}` is longer than the model can see: {limit} tokens",
            f"set `{name}.max_length={limit}`",
        )


def _unused(config: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """A data set at the top that no stage would read."""
    data = config.get("data")
    path = data.get("path", MISSING) if isinstance(data, Mapping) else MISSING
    if (
        path != MISSING
        and stages
        and all("path" in merged_section({name: config[name]}, name, "data") for name in stages)
    ):
        targets = " or ".join(f"`{name}.data.path=...`" for name in stages)
        yield Problem("`data.path` would have no effect: every stage has data of its own", f"give {targets}")
