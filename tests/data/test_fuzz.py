"""Files and rows that nobody would think of: whatever they hold, they are read or refused in a sentence."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from alignctl.data.files import BadFile, read_file
from alignctl.data.formats import FORMATS, KINDS
from alignctl.data.mapping import how_to_read
from alignctl.data.messages import BadRow

OFTEN = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def check_said(error):
    assert str(error)


PIECES = some.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"\r", b"\t", b" ", b'"a"', b"1", b"-1e999", b"NaN",
     b"true", b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\x00", b"9" * 5000, b'{"a": 1}', b"a,b\n", b"1,2\n"]
)  # fmt: skip
CONTENT = some.one_of(some.lists(PIECES, max_size=12).map(b"".join), some.binary(max_size=60))
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".json.xz", ".csv.zst", ".parquet", ".arrow")


@pytest.mark.parametrize("suffix", SUFFIXES)
@OFTEN
@given(content=CONTENT)
def test_bytes_are_rows_or_a_sentence(suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"rows{suffix}")
        file.write_bytes(content)
        try:
            rows = list(read_file(file))
        except BadFile as error:
            rows = []
            check_said(error)
        assert all(isinstance(row, dict) for row in rows)


VALUES = some.recursive(
    some.one_of(
        some.none(), some.booleans(), some.integers(), some.floats(), some.text(max_size=5),
        some.sampled_from(["user", "assistant", "human", "gpt", "\n\nHuman: a\n\nAssistant: b", "\ud800", "good"]),
    ),
    lambda inner: some.one_of(
        some.lists(inner, max_size=3),
        some.dictionaries(
            some.sampled_from(["role", "content", "from", "value", "score", "rank", "text", "type", "weight", "name"]),
            inner, max_size=4,
        ),
    ),
    max_leaves=8,
)  # fmt: skip
MESSAGES = some.lists(
    some.fixed_dictionaries(
        {"role": some.sampled_from(["user", "assistant", "system"]), "content": some.one_of(some.text(), VALUES)},
        optional={"weight": some.sampled_from([0, 1, 0.5]), "name": VALUES},
    ),
    min_size=1, max_size=4,
)  # fmt: skip
COLUMNS = sorted({name for row_format in FORMATS.values() for name in row_format.uses} | {"tools", "images"})
ROWS = some.dictionaries(some.sampled_from(COLUMNS), some.one_of(VALUES, MESSAGES), max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@OFTEN
@given(rows=some.lists(ROWS, min_size=1, max_size=3))
def test_rows_are_used_or_a_reason_is_given(kind, rows):
    for format_name in ("auto", *(name for name, row_format in FORMATS.items() if row_format.kind == kind)):
        try:
            reading = how_to_read(rows, kind, format_name)
        except ValueError as error:
            check_said(error)
            continue
        for row in rows:
            try:
                made = reading.format.rows(reading.mapped(row))
            except (BadRow, KeyError) as error:
                check_said(error)
            else:
                assert made
                json.dumps(made)


PARTS = some.sampled_from(["{{", "}}", "{%", "%}", " a ", ".b", "|", "for x in", "'", "(", ")"])


@OFTEN
@given(template=some.lists(PARTS).map("".join), row=ROWS)
def test_a_template_makes_a_prompt_or_gives_a_reason(template, row):
    try:
        how_to_read([row], "prompts", template=template)
    except ValueError as error:
        check_said(error)
