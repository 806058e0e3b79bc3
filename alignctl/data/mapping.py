"""Rows with the columns that a format looks for, made of those they have: `data.columns` and `data.template`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alignctl.data.files import Row
from alignctl.data.formats import Format, detect_format
from alignctl.data.messages import BadRow

_PROMPT = "prompt"  # the column that a template makes


@dataclass(frozen=True)
class Reading:
    """How rows of a source are to be read."""

    format: Format
    mapped: Callable[[Row], Row]
    """A row with the columns of the format. Raises BadRow."""
    uses: frozenset[str]
    """Columns of the source that are looked at."""


def how_to_read(
    rows: Iterable[Row],
    kind: str,
    name: str = "auto",
    use: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
) -> Reading:
    """How rows of a source are read, from the first of them and the settings of `data`.

    Args:
        kind: What is needed of them.
        name: Their format, or auto.
        use: The side of preferences that is imitated, if any.
        columns: The source of each column: a name, or several with points between them for what is inside of an object
            or a list.
        template: Jinja of a prompt, which sees all columns of the source.

    Raises:
        ValueError: They are no such rows.
    """
    rows, columns = list(rows), dict(columns or {})
    for column, path in columns.items():
        if not any(_dug(row, path) is not None for row in rows):
            found = ", ".join(f"`{name}`" for name in rows[0])
            raise ValueError(f"`data.columns={{{column}: {path}}}`, and the rows have no `{path}`: they have {found}")
    render, seen = _renderer(template) if template is not None else (None, frozenset())

    def mapped(row: Row) -> Row:
        found = {column: _dug(row, path) for column, path in columns.items()}
        if render:
            found[_PROMPT] = render(row)
        return found | {key: value for key, value in row.items() if key not in found and key not in columns.values()}

    plain = not columns and render is None
    row_format = detect_format(rows if plain else _mapped_rows(rows, mapped), kind, name, use)
    tops = frozenset(path if any(path in row for row in rows) else path.split(".")[0] for path in columns.values())
    return Reading(row_format, (lambda row: row) if plain else mapped, tops | seen | frozenset(row_format.uses))


def _mapped_rows(rows: list[Row], mapped: Callable[[Row], Row]) -> list[Row]:
    """Those rows that can be mapped.

    Raises:
        ValueError: None can.
    """
    found, reason = [], None
    for row in rows:
        try:
            found.append(mapped(row))
        except BadRow as error:
            reason = reason or error
    if not found:
        raise ValueError(f"row 1: {reason}")
    return found


def _dug(row: Row, path: str) -> Any:
    """A value in a row; None where it is not there."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.lstrip("-").isdecimal() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _renderer(template: str) -> tuple[Callable[[Row], Any], frozenset[str]]:
    """Writes a row by a template that can reach nothing but the row; and the columns that it names."""
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"`data.template` is no template: {error}") from error

    def render(row: Row) -> str:
        try:
            return compiled.render(row)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise BadRow(f"`data.template`: {error}") from error

    return render, frozenset(meta.find_undeclared_variables(environment.parse(template)))
