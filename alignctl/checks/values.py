"""Checks of a single value: its type, its range, whether it is one of some names. Torch-free."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.checks.bounds import check_setting
from alignctl.config.schema import MISSING, PATHS, ROLE_KEYS
from alignctl.config.secrets import MASK, is_secret
from alignctl.config.suggest import did_you_mean
from alignctl.config.trl_fields import Field, enum_values
from alignctl.config.types import type_error
from alignctl.data.templates import is_text
from alignctl.errors import Problem
from alignctl.methods.registry import Method, methods

_SHOWN = 200  # characters of a value that are shown
_LARGEST = 2**63 - 1
_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # bytes, of Linux
_PLACES = PATHS | {"": ("run_dir", *ROLE_KEYS), "launcher": ("python",)}
"""Settings that may name a file or a folder, by their section."""


def check_value(where: str, value: Any, annotation: str) -> Iterator[Problem]:
    """Whether a value is there, of its type, and one that a file or a text can hold."""
    if value == MISSING:
        yield Problem(f"`{where}` must be given", f"add `{where}=...`")
    elif flaw := next(filter(None, map(_flaw, _scalars(value))), None):
        yield Problem(f"`{where}` {flaw}", None, where)
    elif flaw := _place_flaw(where, value):
        yield Problem(f"`{where}={value[:_SHOWN]}`: {flaw}", None, where)
    elif expected := type_error(value, annotation, enum_values):
        hint = None
        if "text" in expected and isinstance(value, (int, float)):
            typed = "..." if isinstance(value, float) else value  # 12345e6 and 0.10 are numbers that look otherwise now
            hint = f"""quote it to make it text: `'{where}="{typed}"'`"""
        shown = MASK if is_secret(where) else _shown(value)
        yield Problem(f"`{where}` must be {expected}, got `{shown}`", hint, where)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(f"`{where}` must be a finite number, got `{value}`", None, where)
    else:
        yield from check_setting(where, value)


def check_trainer_value(where: str, value: Any, field: Field) -> Iterator[Problem]:
    """Type of a trainer's field, and whether the value is among those its documentation names."""
    # TRL takes a single name where a list is annotated.
    items = [value] if field.annotation.startswith("list[") and isinstance(value, (str, Mapping)) else value
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
        yield Problem(f"unknown `{where}={_shown(str(value))}`", did_you_mean(value, names, prefix=f"{where}="), where)


def distributed_type(config: Mapping[str, Any]) -> Any:
    """How several processes work together, as it was given; `none` where it was not."""
    distributed = config.get("distributed")
    return distributed.get("type", "none") if isinstance(distributed, Mapping) else "none"


def method_of(config: Mapping[str, Any], name: str) -> Method | None:
    method = config[name]["method"]
    return methods().get(method) if isinstance(method, str) else None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _scalars(value: Any) -> Iterator[Any]:
    """What a value is, or what its lists and mappings hold, keys included."""
    if isinstance(value, Mapping):
        yield from value
    if not isinstance(value, (list, Mapping)):
        yield value
        return
    for one in value.values() if isinstance(value, Mapping) else value:
        yield from _scalars(one)


def _flaw(value: Any) -> str | None:
    """Why nothing can be done with a value, whatever it is for."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"has a number of more than {_LARGEST.bit_length()} bits"
    if isinstance(value, str) and "\0" in value:
        return "has a NUL character in it, which no text or file name has"
    return None


def _place_flaw(where: str, value: Any) -> str | None:
    """Why no file can be called so, where a value may name one."""
    section, _, key = where.rpartition(".")
    if not isinstance(value, str) or not (key in _PLACES.get(section.rpartition(".")[2], ()) or key in _PLACES[""]):
        return None
    if key == "chat_template" and is_text(value):
        return None
    return unusable_path(value)


def unusable_path(text: str) -> str | None:
    """Why no file or folder can be called so; None where one can."""
    try:
        place = Path(text).expanduser()
    except RuntimeError:
        return "there is no such user"
    if len(os.fsencode(place)) >= _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in place.parts):
        return "no file or folder has such a long name"
    return None
