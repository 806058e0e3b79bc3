"""Writes docs/settings.md: all methods, and every setting that is alignctl's own, from the code. Imports no torch.

    python scripts/settings_page.py            # writes the page
    python scripts/settings_page.py --print    # prints it instead

Names, types, defaults and meanings are read from the source: a field's meaning is the text under it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import alignctl
from alignctl.config.schema import MISSING, PEFT_CLASSES, RunSettings, annotations
from alignctl.config.types import describe
from alignctl.methods.registry import Method, methods

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"

SECTIONS = {
    "model": "alignctl.config.schema:ModelSettings",
    "data": "alignctl.data.settings:DataSettings",
    "eval": "alignctl.config.schema:EvalSettings",
    "launcher": "alignctl.config.schema:LauncherSettings",
    "distributed": "alignctl.config.schema:DistributedSettings",
    "tracker": "alignctl.config.schema:TrackerSettings",
}
RUN = "alignctl.config.schema:RunSettings"

INTRO = """\
# Settings

Written by `python scripts/settings_page.py` from the code. How recipes set these, and what stands in a stage beside
them, is told in [recipes.md](recipes.md); `alignctl show recipe=...` prints what a recipe comes to.
"""
PEFT = """
## `peft`

`type` is {types}; beside it stands every field of `{library}`, under peft's names and with peft's defaults.
"""
METHODS = """
## Methods

| method | what it is | rows | models in memory | choose it |
|---|---|---|---|---|
"""
FIELDS = """
## Fields of a stage

Every stage takes the fields of its trainer's config class: those of TRL, or of transformers where the trainer is
alignctl's own, under their names, and these.
"""


@dataclass(frozen=True)
class Setting:
    """One field of a settings class, as its source says it."""

    name: str
    annotation: str
    default: str
    """In YAML."""
    meaning: str


def main(arguments: list[str]) -> None:
    if arguments == ["--print"]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    parts = [INTRO, "\n## Of the run\n\nAt the top of a recipe, beside the sections below.\n\n"]
    parts.append(table(field for field in own_fields(RUN) if field.name not in (*SECTIONS, "peft")))
    for section in annotations(RunSettings):
        if section == "peft":
            *types, last = (f"`{kind}`" for kind in PEFT_CLASSES)
            library = next(filter(None, PEFT_CLASSES.values())).partition(":")[2]
            parts.append(PEFT.format(types=f"{', '.join(types)} or {last}", library=f"peft.{library}"))
        elif section in SECTIONS:
            parts += [f"\n## `{section}`\n\n", table(own_fields(SECTIONS[section]))]
    parts += [METHODS, *map(row_of, methods().values()), FIELDS]
    for takers, classes in groupby(stage_classes().items(), key=lambda item: item[1]):
        fixed = set.intersection(*(set(methods()[name].owned_fields) for name in takers))
        fields = [field for one, _ in classes for field in own_fields(one) if field.name not in fixed]
        if fields:
            every = len(takers) == len(methods())
            heading = "Every method" if every else ", ".join(f"`{name}`" for name in takers)
            parts += [f"\n### {heading}\n\n", table(fields)]
    return "".join(parts)


def table(fields: Iterable[Setting]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        cells = (f"`{field.name}`", describe(field.annotation), field.default, field.meaning)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def row_of(method: Method) -> str:
    models = ", ".join(role.replace("_", " ") for role in method.roles)
    what = f"{method.summary} ([paper]({method.paper}))"
    return f"| `{method.name}` | {what} | {method.data_kind} | {models} | {method.when} |\n"


def stage_classes() -> dict[str, list[str]]:
    """Settings classes of stages that are ours, those first that most methods have, with the methods that have each."""
    takers: dict[str, list[str]] = {}
    for method in methods().values():
        for config_class in reversed(our_classes(method.config_class)):
            takers.setdefault(config_class, []).append(method.name)
    return dict(sorted(takers.items(), key=lambda item: -len(item[1])))


def our_classes(config_class: str) -> list[str]:
    """A class and those of ours that it inherits from, as `"module:Class"`."""
    tree, node = read_class(config_class)
    imported = {
        alias.asname or alias.name: f"{item.module}:{alias.name}"
        for item in tree.body
        if isinstance(item, ast.ImportFrom)
        for alias in item.names
    }
    module = config_class.partition(":")[0]
    beside = {item.name: f"{module}:{item.name}" for item in tree.body if isinstance(item, ast.ClassDef)}
    bases = [(beside | imported).get(base.id, "") for base in node.bases if isinstance(base, ast.Name)]
    ours = [base for base in bases if base.startswith(f"{alignctl.__name__}.")]
    return list(dict.fromkeys([config_class, *(name for base in ours for name in our_classes(base))]))


def own_fields(config_class: str) -> Iterator[Setting]:
    """The fields that a class itself defines, in order."""
    _, node = read_class(config_class)
    for item, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield Setting(key_of(item), ast.unparse(item.annotation), in_yaml(item.value), text_of(below))


def read_class(config_class: str) -> tuple[ast.Module, ast.ClassDef]:
    module, _, name = config_class.partition(":")
    file = Path(alignctl.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return tree, next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def key_of(item: ast.AnnAssign) -> str:
    """What recipes call a field: a word of Python's cannot be its name."""
    given = {keyword.arg: keyword.value for keyword in getattr(item.value, "keywords", ())}
    return ast.literal_eval(given["metadata"])["key"] if "metadata" in given else item.target.id


def in_yaml(default: ast.expr) -> str:
    """A default as a recipe would have it; nothing where it has to be given."""
    if isinstance(default, ast.Call):  # field(default_factory=list), or field(default=None, ...)
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        if "default" not in given:
            return {"list": "[]", "dict": "{}"}.get(given["default_factory"].id, "")
        default = given["default"]
    value = ast.literal_eval(default)
    if isinstance(value, str):
        return "" if value == MISSING else value
    return json.dumps(value)


def text_of(node: ast.stmt | None) -> str:
    """The text under a field, in the words of YAML."""
    text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else ""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


if __name__ == "__main__":
    main(sys.argv[1:])
