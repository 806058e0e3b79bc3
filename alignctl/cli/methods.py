"""Lists the methods: what each needs and when to choose it. Torch-free."""

from __future__ import annotations

import textwrap
from typing import Any

from alignctl.cli.terminal import columns
from alignctl.data.formats import FORMATS, KINDS, accepted_kinds
from alignctl.methods.registry import EVERY_OTHER_COLUMN, Method, RowColumn, methods

_WIDTH = 100


def describe_methods() -> list[dict[str, Any]]:
    """The table of methods for `--json`: one object each."""
    return [_describe(method) for method in methods().values()]


def _describe(method: Method) -> dict[str, Any]:
    kinds = accepted_kinds(method.data_kind)
    return {
        "name": method.name,
        "summary": method.summary,
        "when": method.when,
        "data": method.data_kind,
        **({"makes": method.makes} if method.makes else {}),
        "formats": {f.name: f.columns for f in FORMATS.values() if f.kind in kinds},
        "row_columns": [column.name for column in method.row_columns],
        "models": list(method.roles),
        "stability": method.stability,
        "trainer": method.trainer,
        "paper": method.paper,
    }


def render_methods() -> str:
    """The table of methods for people, and what its words mean."""
    blocks = []
    for method in methods().values():
        facts = {
            "choose it": method.when,
            "data": f"{method.data_kind}: {KINDS[method.data_kind]}",
            **({"makes": f"{method.makes}: {KINDS[method.makes]}"} if method.makes else {}),
            **({"and": ", ".join(map(_column, method.row_columns))} if method.row_columns else {}),
            "models": ", ".join(role.replace("_", " ") for role in method.roles),
            "stability": method.stability,
            "paper": method.paper,
        }
        blocks.append(_title(method) + "".join(_line(name, fact) for name, fact in facts.items()))
    for kind in KINDS:
        columns = (_line(f.name, f.columns, width=18) for f in FORMATS.values() if f.kind == kind)
        blocks.append(f"columns of {kind}, one of\n" + "".join(columns))
    return "\n".join([*blocks, _WORDS])


def _column(column: RowColumn) -> str:
    if column == EVERY_OTHER_COLUMN:
        return "any other columns, for functions that score"
    what = f"column `{column.name}`" + (", a number" if column.number else "")
    return what if column.missing is None else f"{what}, {column.missing} where a row has none"


_WORDS = """\
A reference is a second copy of the model; with an adapter it is the policy
with the adapter off, and with `precompute_ref_log_probs` it leaves memory
before training.
stable: a trainer that TRL keeps stable; young: alignctl's own trainer.
"""


def _title(method: Method) -> str:
    title, wide = f"{method.name}: {method.summary}", columns()
    return (textwrap.fill(title, wide, subsequent_indent="  ") if wide else title) + "\n"


def _line(name: str, fact: str, width: int = 10) -> str:
    indent = " " * (width + 3)
    wide = min(columns() or _WIDTH, _WIDTH)
    return textwrap.fill(f"  {name:<{width}} {fact}", wide, subsequent_indent=indent, break_on_hyphens=False) + "\n"
