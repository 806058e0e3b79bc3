"""What a JSON file has to hold for alignctl to use it, written down as types by key. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignctl.config.types import type_error

Form = Any
"""An annotation as text, `[Form]` for a list, or `{key: Form}` for a mapping: with `?` after keys that may be missing
or null, and `*` for all that are not named. Other keys are let be."""


def misfit(content: Any, form: Form, where: str = "") -> str | None:
    """The first thing because of which content has not its form: `key: what was expected`; None where it has."""
    of = f"`{where}` must be " if where else "it must be "
    if isinstance(form, str):
        expected = type_error(content, form)
        return of + expected if expected else None
    if isinstance(form, list):
        if not isinstance(content, list):
            return f"{of}a list"
        found = (misfit(one, form[0], f"{where}[{number}]") for number, one in enumerate(content))
        return next(filter(None, found), None)
    if not isinstance(content, Mapping):
        return f"{of}a mapping"
    named = {key.rstrip("?"): key for key in form if key != "*"}
    for name, key in named.items():
        place = f"{where}.{name}".lstrip(".")
        if name not in content and not key.endswith("?"):
            return f"`{place}` is missing"
        if content.get(name) is None and key.endswith("?"):
            continue
        if flaw := misfit(content[name], form[key], place):
            return flaw
    others = (misfit(one, form["*"], f"{where}.{name}".lstrip(".")) for name, one in content.items()
              if name not in named) if "*" in form else ()  # fmt: skip
    return next(filter(None, others), None)
