"""Rows of a file, one after another and as the file says: nothing is guessed, and no type is made of another.

A text of JSON stays text, a cell of a table of text is text, a number is that number. What a column has to be is said
by who uses it (formats.py). Torch-free; pyarrow is imported for the files that need it, so that checks of others are
light.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

Row = dict[str, Any]
Placed = tuple[int | None, Row]
"""A row with the line in which it begins, counted from 1; None in a file without lines."""

COMPRESSED = (".gz", ".xz", ".zst")
"""Endings behind that of a kind of file."""

_AT_ONCE = 1_000  # rows of a column file
_CHUNK = 2**20  # bytes of a .json file
_PEEKED = 2**12  # bytes
_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}  # what no text begins with
_OTHER_NAMES = {".ndjson": ".jsonl"}
_AS_TEXT = "write it as text, in quotes, or take it out"
_LONGEST_ROW = 2**27  # characters; what is longer is a bracket that was never closed
_SPACE = re.compile(r"[ \t\r\n]*")
_KEY = re.compile(rb'"\s*:')  # what each key ends with, and now and then a text
_LARGEST = 2.0**63  # what orjson reads as a float beyond this was a whole number, or no matter
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


class BadFile(ValueError):
    """A file that is not what its name says; the text says where and why."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class _Twice(ValueError):
    """A key that an object has twice."""


def suffix(path: str | Path) -> str:
    """The ending that says what kind of file it is, without that of a compression."""
    path = Path(str(path).lower())
    ending = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return _OTHER_NAMES.get(ending, ending)


def read_file(file: Path) -> Iterator[Row]:
    """The rows of a file, as `read_placed` has them."""
    for _, row in read_placed(file):
        yield row


def read_placed(file: Path) -> Iterator[Placed]:
    """The rows of a file of one of `FILE_SUFFIXES` with their lines, in order. Lines without anything are no rows.

    Raises:
        BadFile: It cannot be read to its end.
    """
    read = _READERS[suffix(file)]
    with errors_told():
        if read in (_parquet, _arrow):
            if file.suffix.lower() in COMPRESSED:
                raise BadFile(f"a `{suffix(file)}` file is compressed inside, not as a whole", "unpack it")
            yield from read(file)
            return
        with unpacked(file) as stream:
            yield from read(stream)


@contextmanager
def errors_told() -> Iterator[None]:
    """Says of a file that cannot be read, or not unpacked, what is wrong with it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise BadFile(f"cannot be read: {error}") from error
        raise BadFile(f"the compressed file ends early or is damaged: {error}", "copy or download it again") from error


def unpacked(file: Path) -> BinaryIO:
    """What a file holds, unpacked. How it is packed its first bytes say, and not its name: servers and browsers unpack
    files and leave them their names."""
    with file.open("rb") as stream:
        start = stream.read(max(map(len, _MAGIC)))
    packed = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), None)
    if packed == ".gz":
        return gzip.open(file)
    if packed == ".xz":
        return lzma.open(file)
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, counted from 1, without a mark of their encoding."""
    for number, line in enumerate(stream, start=1):
        yield number, _unmarked(line) if number == 1 else line


def _unmarked(start: bytes) -> bytes:
    """The first bytes of a file without a mark of their encoding."""
    for bom, name in _OTHER_BOMS.items():
        if start.startswith(bom):
            raise BadFile(f"the file is {name}, as its first bytes say", "save it as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _texts(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    for number, line in _lines(stream):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(number, error) from error


def _not_utf8(line: int, error: UnicodeDecodeError) -> BadFile:
    return BadFile(f"line {line} is not UTF-8: {error.reason}", "save the file as UTF-8")


# --- JSON


def _json_lines(stream: BinaryIO) -> Iterator[Placed]:
    start = stream.peek(_PEEKED).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"[") or start.partition(b"\n")[0].strip() == b"{":  # one array, or objects of several lines
        yield from _json(stream)
        return
    for number, line in _lines(stream):
        if line.strip():
            yield number, _object(_parsed(line, number), number)


def _parsed(line: bytes, number: int) -> Any:
    """What a line says. The fast parser leaves some things out, for which there is another one: it takes no NaN and no
    half of a surrogate pair, keeps the last of two values of a key, and rounds what has more than 64 bits."""
    try:
        value = orjson.loads(line)
        if len(_KEY.findall(line)) <= _keys(value):
            return value
    except (orjson.JSONDecodeError, RecursionError):
        pass
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _not_utf8(number, error) from error
    except _Twice as error:
        raise _twice(error, number) from error
    except json.JSONDecodeError as error:
        why = _why(error)
        raise BadFile(f"line {number} is not JSON: {why}", "mend the line: one object in each, all of it") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"line {number} cannot be read: {_too_much(error)}", _AS_TEXT) from error


def _keys(value: Any) -> int:
    """The keys of an object and all within it; less than none where a number was rounded."""
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    if isinstance(value, list):
        return sum(map(_keys, value))
    return -sys.maxsize if isinstance(value, float) and abs(value) >= _LARGEST else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(_several(name for name, _ in pairs))
    return found


def _several(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _twice(error: _Twice, line: int) -> BadFile:
    return BadFile(
        f"line {line} has the key `{error}` twice in one object, and there is no telling which one is meant",
        "take one of them out",
    )


def _why(error: json.JSONDecodeError) -> str:
    at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    return "it ends too early" if at_end else f"{error.msg} (column {error.colno})"


def _too_much(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    digits = sys.get_int_max_str_digits()
    return f"it has a number of more than {digits:,} digits" if "digits" in str(error) else str(error)


def _object(value: Any, line: int) -> Row:
    if not isinstance(value, dict):
        raise BadFile(f"line {line} is not an object with named columns", 'a row is `{"prompt": ..., ...}`')
    return value


def _json(stream: BinaryIO) -> Iterator[Placed]:
    """The objects of one array, or objects one behind another, of which no more than some are in memory."""
    text = _Text(stream)
    in_array = text.next() == "["
    if in_array:
        text.skip()
        if text.next() == "]":
            return
    while text.next():
        line = text.line
        yield line, _object(text.value(), line)
        if not in_array:
            continue
        between = text.next()
        if between and between not in ",]":
            raise text.bad("a comma or the end of the list is missing")
        text.skip()
        following = text.next()
        if between == "]":
            if following:
                raise text.bad("there is something behind the end of the list")
            return
        if following == "]":
            raise text.bad("there is a comma behind the last row")
    if in_array:
        raise text.bad("it ends in the middle of a list")


class _Text:
    """A window on a text of JSON."""

    def __init__(self, stream: BinaryIO):
        self._chunks = iter(lambda: stream.read(_CHUNK), b"")
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._parse = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
        self._text, self._at, self._begun = "", 0, False
        self.line = 1
        """Of what comes next."""

    def next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            self._move(_SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                if end < len(self._text) or not self._more():  # else a number may go on
                    self._move(end)
                    return value
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _LONGEST_ROW or not self._more():
                    self._move(error.pos)
                    raise self.bad(_why(error)) from error
            except _Twice as error:
                raise _twice(error, self.line) from error
            except (ValueError, RecursionError) as error:
                if isinstance(error, BadFile):
                    raise
                raise BadFile(f"line {self.line} cannot be read: {_too_much(error)}", _AS_TEXT) from error

    def bad(self, why: str) -> BadFile:
        return BadFile(f"line {self.line} is not JSON: {why}", "mend the file")

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        """Reads on: at least as much again as there is, so that what is long is not read often. Where there is no more,
        the window stays where it is."""
        more, wanted = "", max(len(self._text) - self._at, 1)
        while len(more) < wanted and (chunk := next(self._chunks, None)) is not None:
            more += self._decoded(chunk, more)
        more = more or self._decoded(b"", more, final=True)
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return more != ""

    def _decoded(self, chunk: bytes, before: str, final: bool = False) -> str:
        """The text of a chunk, which follows the window and another text."""
        if not self._begun:
            chunk, self._begun = _unmarked(chunk), True
        try:
            return self._decode(chunk, final)
        except UnicodeDecodeError as error:
            lines = self._text.count("\n", self._at) + before.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _not_utf8(self.line + lines, error) from error


# --- tables of text


def _table(separator: str) -> Callable[[BinaryIO], Iterator[Placed]]:
    def read(stream: BinaryIO) -> Iterator[Placed]:
        csv.field_size_limit(sys.maxsize)  # a transcript is longer than the limit of 128 KiB
        rows = csv.reader((line for _, line in _texts(stream)), delimiter=separator, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                if "new-line character" in str(error):
                    raise BadFile(
                        f"the row that begins in line {line} has a carriage return (CR) without a line feed",
                        "save the file with the line ends of Unix or Windows; a field with such a character stands in "
                        '`"`',
                    ) from error
                raise BadFile(
                    f"the row that begins in line {line} cannot be read: {error}",
                    'a field with quotes or line ends stands in `"`, and each `"` inside it is written twice',
                ) from error
            if cells is None:
                return
            if not cells:
                continue
            if not header:
                header = _header(cells, separator)
            elif len(cells) != len(header):
                raise BadFile(
                    f"line {line} has {len(cells)} fields, the header {len(header)}",
                    f'a field that has a `{_shown(separator)}` in it stands in quotes, `"..."`',
                )
            else:
                yield line, {name: cell or None for name, cell in zip(header, cells, strict=True)}

    return read


def _header(names: list[str], separator: str) -> list[str]:
    if (name := _several(names)) is not None:
        raise BadFile(f"line 1 names the column `{name}` twice", "give each column a name of its own")
    others = [other for other in ",;\t" if other != separator and len(names) == 1 and other in names[0]]
    if others:
        raise BadFile(
            f"line 1 has one column, `{names[0]}`: its fields are separated by `{_shown(others[0])}`",
            f"separate fields by `{_shown(separator)}`" + (", or call the file .tsv" if others[0] == "\t" else ""),
        )
    return names


def _shown(separator: str) -> str:
    return "\\t" if separator == "\t" else separator


def _text(stream: BinaryIO) -> Iterator[Placed]:
    """A row for each line that says something."""
    for number, line in _texts(stream):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


# --- column files


def _parquet(file: Path) -> Iterator[Placed]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with _arrow_errors_told("Parquet"), pyarrow.OSFile(str(file)) as source:
        opened = ParquetFile(source)
        yield from _rows(opened.schema_arrow, opened.iter_batches(_AT_ONCE))


def _arrow(file: Path) -> Iterator[Placed]:
    import pyarrow

    with _arrow_errors_told("Arrow"), pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            source.seek(0)
            opened = batches = pyarrow.ipc.open_stream(source)
        yield from _rows(opened.schema, batches)


def _rows(schema: Any, batches: Iterator[Any]) -> Iterator[Placed]:
    if (name := _several(schema.names)) is not None:
        raise BadFile(f"the file has the column `{name}` twice", "give each column a name of its own")
    named = class_namer(_features(schema.metadata or {})) or _unchanged
    for batch in batches:
        for start in range(0, batch.num_rows, _AT_ONCE):
            for row in batch.slice(start, _AT_ONCE).to_pylist():
                yield None, named(row)


def class_namer(feature: Any) -> Callable[[Any], Any] | None:
    """Puts the names of classes for their numbers, in columns and in all that is inside of them; None where there are
    none.

    Args:
        feature: Of rows or of a part of them, as the library `datasets` writes it down.
    """
    if isinstance(feature, list):  # a former way to write a list
        feature = {"_type": "List", "feature": feature[0]} if feature else None
    if not isinstance(feature, Mapping):
        return None
    kind = feature.get("_type")
    if not isinstance(kind, str):
        namers = {name: namer for name, part in feature.items() if (namer := class_namer(part))}
        return partial(_parts_named, namers=namers) if namers else None
    if kind == "ClassLabel" and isinstance(feature.get("names"), list):
        return partial(_class_name, names=feature["names"])
    inner = class_namer(feature.get("feature"))
    return partial(_each_named, namer=inner) if inner else None


def _class_name(number: int | None, names: list[str]) -> str | None:
    """What a class is called; nothing where there is none, which the library `datasets` writes as -1."""
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def _parts_named(value: Any, namers: Mapping[str, Callable[[Any], Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    return value | {name: namer(value[name]) for name, namer in namers.items() if name in value}


def _each_named(values: Any, namer: Callable[[Any], Any]) -> Any:
    return [namer(value) for value in values] if isinstance(values, list) else values


def _unchanged(row: Row) -> Row:
    return row


def _features(metadata: dict[bytes, bytes]) -> Any:
    """What the library `datasets` says in a file of its columns."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return None


@contextmanager
def _arrow_errors_told(kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OverflowError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        said = " ".join(str(error).split())
        raise BadFile(f"is no {kind} file, or a damaged one: {said}", "copy or download it again") from error


_READERS = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"), ".txt": _text,
    ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip
FILE_SUFFIXES = tuple(_READERS)
"""Kinds of files that rows are read from."""
LIGHT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Those that are read without pyarrow, if they are not compressed by zstd."""
