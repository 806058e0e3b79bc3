"""Checks a value against a type annotation written as text, such as `int | None` or `list[str]`.

One checker serves our own settings and the fields of TRL's config classes, whose source is read and not imported.
Torch-free.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

Choices = Callable[[str], tuple[str, ...] | None]
"""Gives the values of a named enumeration, or None when the name is not one."""

_PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def type_error(value: Any, annotation: str, choices: Choices = lambda name: None) -> str | None:
    """Says what was expected when `value` does not fit `annotation`; None when it fits.

    Numbers are not turned into text or back; a whole number is accepted where a number is expected. Names that are
    neither built in nor known to `choices` are accepted: they belong to classes that only the trainer can build.
    """
    tree = _parse(annotation)
    return None if _fits(value, tree, choices) else _describe(tree, choices)


def describe(annotation: str) -> str:
    """What fits `annotation`, for people."""
    return _describe(_parse(annotation), lambda name: None)


@lru_cache(maxsize=1024)
def _parse(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def _fits(value: Any, tree: ast.expr, choices: Choices) -> bool:
    match tree:
        case ast.BinOp(op=ast.BitOr()):
            return any(_fits(value, member, choices) for member in _members(tree, choices))
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(quoted)):
            return _fits(value, _parse(quoted), choices)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="list"):
            return isinstance(value, list)
        case ast.Name(id="dict"):
            return isinstance(value, Mapping)
        case ast.Name(id=name):
            options = choices(name)
            return options is None or value in options
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return isinstance(value, list) and all(_fits(element, item, choices) for element in value)
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return isinstance(value, Mapping) and all(_fits(element, item, choices) for element in value.values())
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            return any(_is_literal(value, option) for option in _literals(options))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=item):
            return value is None or _fits(value, item, choices)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=items)):
            return any(_fits(value, item, choices) for item in items)
    return True


def _members(tree: ast.expr, choices: Choices) -> list[ast.expr]:
    """The members of a union. `SchedulerType | str` means the names of the enumeration, not any text."""
    match tree:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            members = _members(left, choices) + _members(right, choices)
        case _:
            members = [tree]
    if any(isinstance(member, ast.Name) and choices(member.id) for member in members):
        members = [member for member in members if not (isinstance(member, ast.Name) and member.id == "str")]
    return members


def _literals(tree: ast.expr) -> list[Any]:
    elements = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return [element.value for element in elements if isinstance(element, ast.Constant)]


def _is_literal(value: Any, literal: Any) -> bool:
    """Whether a value is one that is written out; peft writes `pissa_niter_[number of iters]` for a name with a number
    in it."""
    if not isinstance(literal, str) or "[" not in literal:
        return value == literal
    before, _, after = literal.partition("[")
    return isinstance(value, str) and bool(
        re.fullmatch(rf"{re.escape(before)}\d+{re.escape(after.partition(']')[2])}", value)
    )


def _describe(tree: ast.expr, choices: Choices) -> str:
    match tree:
        case ast.BinOp(op=ast.BitOr()):
            return " or ".join(dict.fromkeys(_describe(member, choices) for member in _members(tree, choices)))
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=str(quoted)):
            return _describe(_parse(quoted), choices)
        case ast.Name(id=name) if name in _PLAIN:
            return _PLAIN[name]
        case ast.Name(id="dict") | ast.Subscript(value=ast.Name(id="dict")):
            return "a mapping"
        case ast.Name(id="list"):
            return "a list"
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            of = [one.removeprefix("a ") for one in _describe(item, choices).split(" or ")]
            return f"a list of {' or '.join(f'{one}s' for one in of)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            named = [str(option) for option in _literals(options)]
            return named[0] if len(named) == 1 else "one of " + ", ".join(named)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=item):
            return f"{_describe(item, choices)} or null"
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=items)):
            return " or ".join(dict.fromkeys(_describe(item, choices) for item in items))
        case ast.Name(id=name):
            options = choices(name)
            return "one of " + ", ".join(options) if options else name
    return ast.unparse(tree)
