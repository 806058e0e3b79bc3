"""Prints the oldest versions that the ranges in pyproject.toml allow, as constraints for pip.

    python scripts/ranges.py pyproject.toml > oldest.txt

A package without a lower bound has no line. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LOWER_BOUND = re.compile(r"(?:>=|~=|==)\s*([0-9][\w.]*)")


def oldest(requirements: Iterable[str]) -> list[str]:
    """`name==version` of each requirement that has a lower bound, in order, each once."""
    found = []
    for requirement in requirements:
        wanted = requirement.partition(";")[0]  # what follows is when it is needed
        if bound := _LOWER_BOUND.search(wanted):
            found.append(f"{_NAME.match(wanted)[0]}=={bound[1]}")
    return list(dict.fromkeys(found))


def requirements(pyproject: Path) -> list[str]:
    """What the package needs, and what its tests need."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


if __name__ == "__main__":
    for line in oldest(requirements(Path(sys.argv[1]))):
        print(line)
