"""Rows with the columns that a format looks for, made of those they have: `data.columns` and `data.template`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
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
    widened: Callable[[Row], Row]
    """A row with the columns that `data.columns` and `data.template` make, beside its own. Raises BadRow."""
    hidden: frozenset[str]
    """Its own columns of which they are made: the format does not see them."""
    uses: frozenset[str]
    """Columns of the source that are looked at."""

    def seen(self, row: Row) -> Row:
        """What the format sees of such a row."""
        return _shown(row, self.hidden)

    def mapped(self, row: Row) -> Row:
        """A row of the source as the format sees it. Raises BadRow."""
        return self.seen(self.widened(row))


def how_to_read(
    rows: Iterable[Row],
    kind: str,
    name: str = "auto",
    use: str | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    beside: Collection[str] = (),
) -> Reading:
    """How rows of a source are read, from the first of them and the settings of `data`.

    Args:
        kind: What is needed of them.
        name: Their format, or auto.
        use: The side of preferences that is imitated, if any.
        columns: The source of each column: a name, or several with points between them for what is inside of an object
            or a list.
        template: Jinja of a prompt, which sees all columns of the source.
        beside: Names of the columns that a method looks at beside the format's; `*` for all.

    Raises:
        ValueError: They are no such rows, or a column is made that nobody looks at.
    """
    rows, columns = list(rows), dict(columns or {})
    for column, path in columns.items():
        if not any(_dug(row, path) is not None for row in rows):
            found = ", ".join(f"`{name}`" for name in rows[0])
            raise ValueError(f"`data.columns={{{column}: {path}}}`, and the rows have no `{path}`: they have {found}")
    render, seen = _renderer(template, rows) if template is not None else (None, frozenset())

    made = [*columns, *([_PROMPT] if render else [])]

    def widened(row: Row) -> Row:
        found = {column: _dug(row, path) for column, path in columns.items()}
        if render:
            found[_PROMPT] = render(row)
        return found | {key: value for key, value in row.items() if key not in found}

    tops = frozenset(_top(rows, path) for path in columns.values())
    # An object that a column is made of is none itself; of a list there may be others.
    objects = {top for top in tops if any(isinstance(row.get(top), Mapping) for row in rows)}
    hidden = (frozenset(columns.values()) | objects | seen) - frozenset(made)
    row_format = detect_format(
        _mapped_rows(rows, lambda row: _shown(widened(row), hidden)) if made else rows, kind, name, use
    )
    for column in made:
        if column not in row_format.uses and (column == _PROMPT or not {column, "*"} & set(beside)):
            how = "data.template" if render and column == _PROMPT else f"data.columns={{{column}: {columns[column]}}}"
            raise ValueError(
                f"`{how}` would have no effect: the rows have the format `{row_format.name}` "
                f"({row_format.columns}), which looks at no `{column}`"
            )
    within = {
        _without_places(path) + use.removeprefix(column)
        for column, path in columns.items()
        for use in (column, *row_format.uses)
        if use == column or use.startswith(f"{column}.")
    }
    uses = tops | within | seen | frozenset(row_format.uses)
    return Reading(row_format, widened if made else _as_it_is, hidden, uses)


def _top(rows: list[Row], path: str) -> str:
    """The column of the source that a path begins with."""
    return path if any(path in row for row in rows) else path.split(".")[0]


def _without_places(path: str) -> str:
    """A path without places in lists."""
    return ".".join(part for part in path.split(".") if not part.lstrip("-").isdecimal())


def _as_it_is(row: Row) -> Row:
    return row


def _shown(row: Row, hidden: frozenset[str]) -> Row:
    return {key: value for key, value in row.items() if key not in hidden} if hidden else row


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


class _Watched(dict):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Row, note: set[str]):
        super().__init__(row)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        self._note.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._note.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        self._note.update(self)
        return super().items()

    def values(self) -> Any:
        self._note.update(self)
        return super().values()


def _renderer(template: str, rows: list[Row]) -> tuple[Callable[[Row], Any], frozenset[str]]:
    """Writes a row by a template that can reach nothing but the row; and the columns that it names, or reads of some
    rows."""
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: "" if value is None else value,  # an empty cell
    )
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"`data.template` is no template: {error}") from error

    def render(row: Row, whole: Row | None = None) -> str:
        try:
            return compiled.render({"row": whole or row} | row)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise BadRow(f"`data.template`: {error}") from error

    read = set(meta.find_undeclared_variables(environment.parse(template)))
    for row in rows:
        with suppress(BadRow):
            render(row, _Watched(row, read))
    return render, frozenset(read)
