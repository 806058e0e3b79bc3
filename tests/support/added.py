"""A method that a test adds to the table, as somebody would who adds one to the product."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from alignctl.methods.registry import Method, methods

_ROOT = Path(__file__).parents[2]


def add_method(monkeypatch: pytest.MonkeyPatch, name: str, like: str, **columns: object) -> Method:
    """Adds a row to the table for the time of a test: that of another method but for the columns given."""
    method = dataclasses.replace(methods()[like], name=name, **columns)
    monkeypatch.setitem(methods(), name, method)
    return method


def product_with(folder: Path, files: Mapping[str, str]) -> Path:
    """A copy of the product with more files in it, by their paths; for tests that start processes.

    Returns:
        What PYTHONPATH has to name, so that the copy is what runs.
    """
    for part in ("alignctl", "conf", "recipes"):
        shutil.copytree(_ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files.items():
        (folder / path).write_text(text, encoding="utf-8")
    return folder
