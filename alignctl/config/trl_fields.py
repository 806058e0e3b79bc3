"""Reads the fields of TRL's, transformers', peft's and our config classes from their source, without importing them.

Importing `trl.DPOConfig` takes seconds and wants torch; parsing its file takes milliseconds. What is read is what is
installed, so it cannot go stale. Torch-free.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Where a class lives whose package gives it away under another name.
_HOMES = {"transformers:TrainingArguments": "transformers.training_args:TrainingArguments"}
# Modules whose enumerations appear in annotations.
_ENUM_MODULES = ("transformers.trainer_utils", "transformers.training_args")
# "Possible values are: `'sigmoid'`, `'hinge'`." and "Possible values are: `reverse_kl` (default), `forward_kl`."
_POSSIBLE_VALUES = re.compile(r"[Pp]ossible values are:(.+?)\.(?:\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """One field of a config class."""

    annotation: str
    default: Any
    """The default where the source writes it as a literal, else None."""
    choices: tuple[str, ...] | None
    """The values that the field's metadata or its help say are possible, if they do."""


@cache
def config_fields(config_class: str) -> dict[str, Field]:
    """Reads all fields of a dataclass, those it inherits included.

    Args:
        config_class: `"package.module:Class"`, for example `"trl.trainer.dpo_config:DPOConfig"`.

    Raises:
        LookupError: The module or the class is not where it is said to be: the installed version differs from the one
            this was written for.
    """
    config_class = _HOMES.get(config_class, config_class)
    module, _, name = config_class.partition(":")
    tree = _module_tree(module)
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if node is None:
        raise LookupError(f"no class `{name}` in `{module}`: the installed version is not one this release knows")
    fields: dict[str, Field] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (home := _imported_from(tree, module, base.id)):
            fields.update(config_fields(home))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields[item.target.id] = _read_field(item)
    return fields


@cache
def enum_values(name: str) -> tuple[str, ...] | None:
    """The string values of an enumeration that annotations mention, such as `SchedulerType`; None if not found."""
    return tuple(_enum(name).values()) or None


@dataclass(frozen=True)
class Arguments:
    """What a function takes by name."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    any: bool
    """Whether it takes all others, too."""


@cache
def scheduler_arguments() -> dict[str, Arguments]:
    """What `lr_scheduler_kwargs` may hold, by `lr_scheduler_type`.

    Raises:
        LookupError: transformers has no table of schedules where it is said to be.
    """
    body = _module_tree("transformers.optimization").body
    functions = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TYPE_TO_SCHEDULER_FUNCTION":
            table = node.value
            assert isinstance(table, ast.Dict)
            schedules = zip(map(ast.unparse, filter(None, table.keys)), map(ast.unparse, table.values), strict=True)
            names = _enum("SchedulerType")
            return {names[key.rpartition(".")[2]]: _arguments(functions[value]) for key, value in schedules}
    raise LookupError(
        "no schedules in `transformers.optimization`: the installed version is not one this release knows"
    )


def _arguments(of: ast.arguments) -> Arguments:
    """Without what the trainer gives a schedule by itself."""
    names = [argument.arg for argument in of.args]
    required = names[: len(names) - len(of.defaults)]
    ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    return Arguments(
        tuple(name for name in required if name not in ours),
        tuple(name for name in names if name not in (*required, *ours)),
        any=of.kwarg is not None,
    )


@cache
def _enum(name: str) -> dict[str, str]:
    """Names and string values of an enumeration; empty if it is not found."""
    for module in _ENUM_MODULES:
        for node in _module_tree(module).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {
                    ast.unparse(item.targets[0]): item.value.value
                    for item in node.body
                    if isinstance(item, ast.Assign)
                    and isinstance(item.value, ast.Constant)
                    and isinstance(item.value.value, str)
                }
    return {}


@cache
def _module_tree(module: str) -> ast.Module:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)  # of a top-level package: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"the package `{package}` is not installed")
    path = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py")
    if not path.is_file():
        raise LookupError(f"`{module}` has no file {path}: the installed version is not one this release knows")
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported_from(tree: ast.Module, module: str, name: str) -> str | None:
    """`"module:Class"` of a base class, or None when it is not followed (a class of the same file is)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return f"{module}:{name}"
        if isinstance(node, ast.ImportFrom):
            imported = {alias.asname or alias.name: alias.name for alias in node.names}
            if name in imported:
                parents = module.split(".")[: -node.level] if node.level else []
                home = ".".join(parents + ([node.module] if node.module else []))
                home = _HOMES.get(f"{home}:{imported[name]}", f"{home}:{imported[name]}")
                return home if home.split(".")[0] in ("alignctl", "trl", "transformers") else None
    return None


def _read_field(item: ast.AnnAssign) -> Field:
    default, metadata = None, {}
    if isinstance(item.value, ast.Call):
        for keyword in item.value.keywords:
            if keyword.arg == "default":
                default = _literal(keyword.value)
            elif keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
                default = _literal(keyword.value.body)
            elif keyword.arg == "metadata":
                metadata = _literal(keyword.value) or {}
    elif item.value is not None:
        default = _literal(item.value)
    return Field(ast.unparse(item.annotation), default, _choices(metadata))


def _choices(metadata: dict[str, Any]) -> tuple[str, ...] | None:
    if listed := metadata.get("choices"):
        return tuple(listed)
    found = _POSSIBLE_VALUES.search(metadata.get("help", ""))
    return tuple(re.findall(r"`'?([\w-]+)'?`", found.group(1))) if found else None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
