"""Checks of a single value: its type, its range, whether it is one of some names. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from alignctl.checks.bounds import check_setting
from alignctl.config.schema import MISSING
from alignctl.config.secrets import MASK, is_secret
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import Field, enum_values
from alignctl.config.types import type_error
from alignctl.errors import Problem
from alignctl.methods.registry import Method, methods


def check_value(where: str, value: Any, annotation: str) -> Iterator[Problem]:
    """Whether a value is there and of its type."""
    if value == MISSING:
        yield Problem(f"`{where}` must be given", f"add `{where}=...`")
    elif expected := type_error(value, annotation, enum_values):
        hint = None
        if "text" in expected and isinstance(value, (int, float)):
            typed = "..." if isinstance(value, float) else value  # 12345e6 and 0.10 are numbers that look otherwise now
            hint = f"""quote it to make it text: `'{where}="{typed}"'`"""
        shown = MASK if is_secret(where) else _shown(value)
        yield Problem(f"`{where}` must be {expected}, got `{shown}`", hint)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(f"`{where}` must be a finite number, got `{value}`")
    else:
        yield from check_setting(where, value)


def check_trainer_value(where: str, value: Any, field: Field) -> Iterator[Problem]:
    """Type of a trainer's field, and whether the value is among those its documentation names."""
    # TRL takes a single value where a list is annotated.
    items = [value] if field.annotation.startswith("list[") and not isinstance(value, (list, type(None))) else value
    if any(check_value(where, items, field.annotation)):
        yield from check_value(where, value, field.annotation)
    elif field.choices:
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, str) and item not in field.choices:
                yield Problem(f"`{where}` has no value `{item}`", did_you_mean(item, field.choices, f"{where}="))


def check_choice(where: str, value: Any, options: Iterable[str | None]) -> Iterator[Problem]:
    """Whether a value is one of some names."""
    names = [name for name in options if name]
    if value not in names:
        yield Problem(f"unknown `{where}={value}`", did_you_mean(value, names, prefix=f"{where}="))


def distributed_type(config: Mapping[str, Any]) -> Any:
    """How several processes work together, as it was given; `none` where it was not."""
    distributed = config.get("distributed")
    return distributed.get("type", "none") if isinstance(distributed, Mapping) else "none"


def method_of(config: Mapping[str, Any], name: str) -> Method | None:
    method = config[name]["method"]
    return methods().get(method) if isinstance(method, str) else None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
