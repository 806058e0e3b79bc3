"""The type checker on annotations as TRL and alignctl write them."""

import pytest

from alignctl.config.types import type_error


def colours(name):
    return {"Colour": ("red", "blue")}.get(name)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (1, "int"),
        (1, "float"),
        (1.5, "float"),
        (None, "int | None"),
        ("x", "dict[str, Any] | str | None"),
        ({"a": 1}, "dict[str, Any] | str | None"),
        (["a"], "list[str]"),
        ([["a"]], "list[list[str]]"),
        ("red", "Colour | str"),
        ("a", "Literal['a', 'b']"),
        (None, "Optional[Union[list[str], str]]"),
        (["q"], "Optional[Union[list[str], str]]"),
        (object(), "SomeClassOfTheirs"),
        ({"a": 1}, "'dict'"),
    ],
)
def test_fits(value, annotation):
    assert type_error(value, annotation, colours) is None


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("high", "float", "a number"),
        (True, "int", "a whole number"),
        (1.0, "int", "a whole number"),
        (1, "bool", "true or false"),
        (5, "str | None", "text or null"),
        (["a", 1], "list[str]", "a list of texts"),
        ("green", "Colour | str", "one of red, blue"),
        ("c", "Literal['a', 'b']", "one of a, b"),
        (3, "dict[str, Any] | str", "a mapping or text"),
    ],
)
def test_does_not_fit(value, annotation, expected):
    assert type_error(value, annotation, colours) == expected
