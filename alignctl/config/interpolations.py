"""How much text `${...}` would become, before any of it is resolved. Torch-free, pure.

Ten lines that each name the one below ten times become ten billion, so what a value refers to is counted first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MOST_TEXT = 1_000_000
"""Characters, and values, of a config with everything filled in."""
MOST_STEPS = 40
"""Interpolations that lead to each other."""
_NODE = re.compile(r"\$\{\s*([^\s:${}]+)\s*\}")
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:([^{}]*)\}")
_NESTED = re.compile(r"\$\{[^:{}]*\$\{")
_WORD = re.compile(r"[\w.\[\]]+")

Path = tuple[str, ...]


def find_flaw(config: Mapping[str, Any]) -> str | None:
    """What keeps a config from being filled in; None where nothing does.

    Args:
        config: Plain values, with interpolations as they were written.
    """
    try:
        _Sizes(config).size((), config, 0)
    except _TooMuch as error:
        return str(error)
    return None


class _TooMuch(ValueError):
    """The message names the key."""


class _Sizes:
    """Sizes of the parts of a config with everything filled in, each counted once."""

    def __init__(self, config: Mapping[str, Any]):
        self._config, self._known = config, {}  # type: ignore[var-annotated]
        self._within: set[Path] = set()

    def size(self, path: Path, value: Any, steps: int) -> int:
        key = ".".join(path)
        if path in self._known:
            return self._known[path]
        if path in self._within:
            raise _TooMuch(f"`{key}` refers to itself")
        if steps > MOST_STEPS:
            raise _TooMuch(f"`{key}` is reached by more than {MOST_STEPS} interpolations that lead to each other")
        self._within.add(path)
        if isinstance(value, Mapping):
            size = 1 + sum(self.size((*path, str(name)), one, steps) for name, one in value.items())
        elif isinstance(value, list):
            size = 1 + sum(self.size((*path, str(number)), one, steps) for number, one in enumerate(value))
        elif isinstance(value, str) and "${" in value:
            if _NESTED.search(value):
                raise _TooMuch(f"`{key}` has an interpolation in the name of another, which is not taken")
            size = len(value) + sum(self.size(place, one, steps + 1) for place, one in self._named(path, value))
        else:
            size = len(value) if isinstance(value, str) else 1
        if size > MOST_TEXT:
            raise _TooMuch(f"`{key}` with everything filled in is longer than {MOST_TEXT:,} characters")
        self._within.remove(path)
        self._known[path] = size
        return size

    def _named(self, path: Path, text: str) -> Iterator[tuple[Path, Any]]:
        """Places that a text refers to, and what stands there."""
        for name in _NODE.findall(text):
            yield from self._at(path, name)
        for arguments in _RESOLVER.findall(text):
            for name in _WORD.findall(arguments):
                yield from self._at(path, name)

    def _at(self, path: Path, name: str) -> Iterator[tuple[Path, Any]]:
        up = len(name) - len(name.lstrip("."))
        parts = re.findall(r"[^.\[\]]+", name)
        place = (*path[: len(path) - up], *parts) if up else tuple(parts)
        value: Any = self._config
        for part in place:
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return  # OmegaConf says that there is none
        yield place, value
