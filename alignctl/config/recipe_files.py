"""Looks at a YAML file of a user's before Hydra reads it: it has to be small, and of plain values. Torch-free.

In YAML a part can be named and stand at many places, so that a few hundred bytes become millions of values; there are
kinds of values that no setting has; and a recipe could bring settings of Hydra itself, which import what they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from omegaconf._utils import get_yaml_loader

from alignctl.errors import RequestError

MOST_BYTES = 200_000
MOST_VALUES = 20_000
"""With every alias written out."""
MOST_DEPTH = 40
"""Of mappings and lists in each other."""
_MOST_DIGITS = 40
_MOST_LETTERS = 200
"""Of a key."""
_TAG = "tag:yaml.org,2002:"
_OF_HYDRA = ("hydra", "hydra/", "/hydra/")


class _Bad(ValueError):
    """What is wrong with a file, and in which line."""

    def __init__(self, message: str, mark: yaml.Mark | None = None):
        super().__init__(message if mark is None else f"line {mark.line + 1}: {message}")


def look_at(path: Path) -> None:
    """Whether Hydra can be given a file.

    Raises:
        RequestError: It cannot; the message names the file and the line.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _Bad(f"it has {path.stat().st_size:,} bytes, and a recipe has at most {MOST_BYTES:,}")
        _look_at(path.read_text(encoding="utf-8"))
    except _Bad as error:
        raise RequestError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: the YAML is broken: {' '.join(str(error).split())}") from error


def _look_at(text: str) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.CSafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise _Bad(f"values are nested in each other more than {MOST_DEPTH} times", event.start_mark)
        if number > 2 * MOST_VALUES:
            raise _Bad(f"there are more than {MOST_VALUES:,} values", event.start_mark)
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag not in (None, f"{_TAG}str"):
            kind = event.tag.replace(_TAG, "!!")
            raise _Bad(f"`{kind}` is no kind of value that a setting has", event.start_mark)
    for line in text.splitlines():
        if line.startswith("#") and re.search(r"@package\s+hydra\b", line):
            raise _Bad(f"`{line.strip('# ')}` has settings of Hydra itself, which are not taken")
    documents = list(yaml.compose_all(text, Loader=get_yaml_loader()))
    if len(documents) > 1:
        raise _Bad("there are several documents in the file", documents[1].start_mark)
    if not documents or documents[0] is None:
        return
    root = documents[0]
    if not isinstance(root, yaml.MappingNode):
        raise _Bad("a recipe is a mapping of keys to values", root.start_mark)
    _written_out(root, {}, set())
    for key, value in root.value:
        if key.value == "hydra":
            raise _Bad("`hydra` has settings of Hydra itself, which are not taken", key.start_mark)
        if key.value == "defaults":
            _look_at_defaults(value)


def _written_out(node: yaml.Node, known: dict[int, int], within: set[int]) -> int:
    """Values of a part with its aliases written out."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in within:
        raise _Bad("an alias names what it stands in", node.start_mark)
    within.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _look_at_scalar(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _look_at_key(key, value)
    count = 1 + sum(_written_out(part, known, within) for part in _parts(node))
    if count > MOST_VALUES:
        raise _Bad(f"with its aliases written out there are more than {MOST_VALUES:,} values", node.start_mark)
    within.remove(id(node))
    known[id(node)] = count
    return count


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        yield from (value for _, value in node.value)


def _look_at_scalar(node: yaml.ScalarNode) -> None:
    if node.tag == f"{_TAG}int" and len(node.value) > _MOST_DIGITS:
        raise _Bad(f"a number has {len(node.value):,} digits", node.start_mark)
    if "\0" in node.value:
        raise _Bad("a text has a NUL character in it", node.start_mark)


def _look_at_key(key: yaml.Node, value: yaml.Node) -> None:
    if key.tag == f"{_TAG}merge":
        merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(one, yaml.MappingNode) for one in merged):
            raise _Bad("`<<` takes mappings", key.start_mark)
        return
    if not isinstance(key, yaml.ScalarNode):
        raise _Bad("a key is text, and here it is a list or a mapping", key.start_mark)
    if key.tag != f"{_TAG}str":
        raise _Bad(f"the key `{key.value}` is no text: quote it", key.start_mark)
    if not key.value or len(key.value) > _MOST_LETTERS or not key.value.isprintable():
        raise _Bad(
            f"the key `{key.value[:20]}...` is empty, too long, or has characters that nobody sees", key.start_mark
        )


def _look_at_defaults(node: yaml.Node) -> None:
    """The list that says what a file starts from: names, and one `group: option` each."""
    if not isinstance(node, yaml.SequenceNode):
        raise _Bad("`defaults` is a list of what the file starts from", node.start_mark)
    for item in node.value:
        if isinstance(item, yaml.MappingNode):
            if len(item.value) != 1:
                raise _Bad("an item of `defaults` is one `group: option`", item.start_mark)
            ((key, value),) = item.value
            named, options = key.value, value.value if isinstance(value, yaml.SequenceNode) else [value]
            taken = (f"{_TAG}str", f"{_TAG}null") if options == [value] else (f"{_TAG}str",)
        else:
            options, taken = [item], (f"{_TAG}str",)
            named = str(item.value)
        if any(not isinstance(one, yaml.ScalarNode) or one.tag not in taken for one in options):
            raise _Bad("an item of `defaults` is the name of a file, or one `group: option`", item.start_mark)
        if any(word == "hydra" or word.startswith(_OF_HYDRA[1:]) for word in named.split()):
            raise _Bad(f"`{named}` has settings of Hydra itself, which are not taken", item.start_mark)
