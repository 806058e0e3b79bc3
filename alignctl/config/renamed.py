"""Fields of stages that had another name once, which is still taken. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.methods.registry import RENAMED, methods


def former_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Stages, and the fields of each that had another name: the former one, and that of today."""
    for stage, settings in config.items():
        method = settings.get("method") if isinstance(settings, Mapping) else None
        if isinstance(method, str) and method in methods():
            for former, name in {**RENAMED, **methods()[method].renamed}.items():
                yield stage, former, name


def present_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config that was composed before, with the names that fields have now."""
    for stage, former, name in former_names(config):
        if former in config[stage]:
            config[stage].setdefault(name, config[stage].pop(former))
    return config
