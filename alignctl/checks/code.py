"""Checks of what users write in a language: functions that score, and chat templates. Nothing of it is run, only read.

Torch-free.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from alignctl.config.suggest import closest
from alignctl.errors import Problem

_MOST_BYTES = 1_000_000
"""Of a file that is read."""


def check_function(where: str, target: str) -> Iterator[Problem]:
    """Whether there is a function `module:name` or `file.py:name`, as far as the source says. A module that is not
    here may be where the stage runs."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        file: Path | None = Path(place).expanduser()
        if not file.is_file():
            yield Problem(f"`{where}={target}`: there is no file {place}")
            return
    else:
        file = _source(place)
    if file is not None:
        yield from _defined(f"`{where}={target}`", file, name)


def check_template(where: str, text: str) -> Iterator[Problem]:
    """Whether a chat template is Jinja that can stand by itself.

    Args:
        where: The setting or the file that has it.
    """
    if len(text) > _MOST_BYTES:
        yield Problem(f"`{where}` has {len(text):,} characters, and a chat template has at most {_MOST_BYTES:,}")
        return
    from jinja2 import TemplateError, nodes

    try:
        tree = _environment().parse(text)
        others = next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
    except TemplateError as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        yield Problem(f"`{where}` is no Jinja{line}: {error}")
        return
    except RecursionError:
        yield Problem(f"`{where}` is nested too deeply")
        return
    if others is not None:
        yield Problem(
            f"`{where}`, line {others.lineno}: a chat template cannot take in others", "write it in one piece"
        )


def _environment():  # type: ignore[no-untyped-def]
    """Jinja as transformers (5.23) has it for chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):  # type: ignore[no-untyped-def]
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    return ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])


def _source(name: str) -> Path | None:
    """The file of a module, where there is one; nothing is imported to find it."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)  # finds, and imports nothing: it is not inside of a package
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        inside = Path(folder, *rest)
        for file in (inside.with_name(f"{inside.name}.py"), inside / "__init__.py"):
            if file.is_file():
                return file
    return None


def _defined(given: str, file: Path, name: str) -> Iterator[Problem]:
    """Whether a file is Python, and has a name at its top."""
    try:
        source = file.read_bytes()
        tree = ast.parse(source if len(source) <= _MOST_BYTES else b"", filename=str(file))
    except OSError as error:
        yield Problem(f"{given}: {file} cannot be read: {error.strerror}")
        return
    except SyntaxError as error:
        yield Problem(f"{given}: {file}, line {error.lineno}, is no Python: {error.msg}")
        return
    except (ValueError, RecursionError, MemoryError) as error:
        yield Problem(f"{given}: {file} is no Python: {error}")
        return
    names, all_known = _names(tree)
    if all_known and len(source) <= _MOST_BYTES and name not in names:
        near = closest(name, names, 1)
        yield Problem(
            f"{given}: {file} has no function `{name}`",
            f"did you mean `{near[0]}`?" if near else f"it has {', '.join(sorted(names)[:5]) or 'none at all'}",
        )


def _names(tree: ast.Module) -> tuple[set[str], bool]:
    """Names that a module has once it is imported, and whether these are all: not after `import *`, or where names are
    made by `globals()` or `__getattr__`."""
    names: set[str] = set()
    all_known = True
    inside: list[ast.AST] = list(tree.body)
    while inside:
        node = inside.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            all_known = all_known and "*" not in imported
            names.update(imported)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names.add(node.id)
            all_known = all_known and node.id not in ("globals", "vars", "exec", "setattr")
        inside += ast.iter_child_nodes(node)
    return names, all_known and "__getattr__" not in names
