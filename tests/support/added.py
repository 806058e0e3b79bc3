"""A method that a test adds to the table, as somebody would who adds one to the product."""

from __future__ import annotations

import dataclasses

import pytest

from alignctl.methods.registry import Method, methods


def add_method(monkeypatch: pytest.MonkeyPatch, name: str, like: str, **columns: object) -> Method:
    """Adds a row to the table for the time of a test: that of another method but for the columns given."""
    method = dataclasses.replace(methods()[like], name=name, **columns)
    monkeypatch.setitem(methods(), name, method)
    return method
