"""Prints a composed config, with the file each value came from on request. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alignctl.config.batches import batch_of
from alignctl.config.flat import flatten
from alignctl.config.secrets import mask
from alignctl.config.stages import stage_names


def render_config(config: Mapping[str, Any], sources: Mapping[str, str] | None, as_json: bool) -> str:
    """The config as YAML or JSON, secrets masked; in YAML followed by comments that say what an optimizer step takes.

    Args:
        sources: File of each dotted key; given, every value is followed by where it comes from.
    """
    config = _ordered(mask(dict(config)))
    if as_json:
        content = {"config": config, "sources": dict(sources)} if sources is not None else config
        return json.dumps(content, indent=2) + "\n"
    batches = {name: batch_of(config, name) for name in stage_names(config)}
    follows = "".join(f"# global batch of {name}: {batch}\n" for name, batch in batches.items() if batch)
    if sources is None:
        return OmegaConf.to_yaml(OmegaConf.create(config)) + follows
    flat = flatten(config)
    lines = {key: f"{key}: {json.dumps(value)}" for key, value in flat.items()}
    width = max(map(len, lines.values()))
    return (
        "".join(f"{line:<{width}}  # {_short(sources.get(key, 'default'))}\n" for key, line in lines.items()) + follows
    )


def _ordered(config: dict[str, Any]) -> dict[str, Any]:
    """Stages last, in the order they run, as far as that is said."""
    said = config.get("stages")
    stages = [name for name in said if isinstance(name, str) and name in config] if isinstance(said, list) else []
    return {key: value for key, value in config.items() if key not in stages} | {name: config[name] for name in stages}


def _short(path: str) -> str:
    """A path relative to the current folder where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
