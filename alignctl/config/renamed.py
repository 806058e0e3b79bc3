"""Fields of stages, and settings of rows, that had another name once, which is still taken. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.data.settings import RENAMED as OF_DATA
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
    rename_data(config)
    return config


def rename_data(config: dict[str, Any]) -> None:
    """Gives settings of rows their present names, in the section `data` and in those of stages; one that is there under
    both names is left, to be refused as unknown."""
    for holder in (config, *config.values()):
        data = holder.get("data") if isinstance(holder, Mapping) else None
        for former, name in OF_DATA.items() if isinstance(data, dict) else ():
            if former in data and name not in data:
                data[name] = data.pop(former)
