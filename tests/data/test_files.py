"""Files of every kind, whole and broken: rows as the file says, or a sentence that says where it is wrong."""

import gzip
import io
import json
import lzma
import math

import pytest

from alignctl.data.files import BadFile, read_file, read_placed

ROWS = [{"a": 1, "b": "x"}, {"a": 0, "b": None}]
LINES = b'{"a": 1, "b": "x"}\n{"a": 0, "b": null}\n'


def read(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    return list(read_file(file))


def zstd(content):
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("marked.jsonl", b"\xef\xbb\xbf" + LINES),
        ("blank.jsonl", b"\n" + LINES.replace(b"\n", b"\r\n \r\n")),
        ("array.jsonl", b"[%s]" % LINES.strip().replace(b"\n", b",\n")),
        ("rows.json", b"[%s]\n" % LINES.strip().replace(b"\n", b",")),
        ("lines.json", LINES),
        ("marked.json", b"\xef\xbb\xbf" + LINES),
        ("pairs[1].jsonl", LINES),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("rows.jsonl.zst", zstd(LINES)),
        ("unpacked.jsonl.gz", LINES),
        ("packed.jsonl", gzip.compress(LINES, mtime=0)),
        ("packed.csv.xz.jsonl", lzma.compress(LINES)),
        ("rows.ndjson", LINES),
        ("ROWS.JSONL.GZ", gzip.compress(LINES, mtime=0)),
        ("written.jsonl", b"{\n" + LINES.replace(b"}\n{", b"}\n{\n").removeprefix(b"{")),
    ],
)
def test_json_in_every_dress(tmp_path, name, content):
    assert read(tmp_path, name, content) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_values_are_those_that_are_written(tmp_path, name):
    """Dates stay text, and nothing is rounded; what strict parsers refuse is read, for a column may not be used."""
    line = (
        rb'{"day": "1910-07-20", "zero": "001", "large": 123456789012345678901234567890, "none": NaN, "half": "\ud800"}'
    )
    (row,) = read(tmp_path, name, line)
    assert math.isnan(row.pop("none"))
    assert row == {"day": "1910-07-20", "zero": "001", "large": 123456789012345678901234567890, "half": "\ud800"}


def test_a_text_that_looks_like_keys_is_no_key(tmp_path):
    row = {"a": 'they wrote "a": 1, "a" : 2', "b": [{"a": 1}, {"a": 2}]}
    assert read(tmp_path, "rows.jsonl", json.dumps(row).encode()) == [row]


@pytest.mark.parametrize("rows_in_a_chunk", [1, 3])
def test_a_list_is_read_a_part_at_a_time(tmp_path, monkeypatch, rows_in_a_chunk):
    """Wherever parts end: in a number, in a character of several bytes, between rows."""
    monkeypatch.setattr("alignctl.data.files._CHUNK", rows_in_a_chunk)
    rows = [{"a": -12.5e3, "b": "häß\n\\", "c": [{}, {"d": [True]}]}] * 3
    assert read(tmp_path, "rows.json", json.dumps(rows, ensure_ascii=False, indent=1).encode()) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jsonl", LINES + b'{"a": "te', "line 3 is not JSON: it ends too early"),
        ("bad.jsonl", LINES + b"\n{a: 1}", "line 4 is not JSON: .* double quotes .column 2."),
        ("twice.jsonl", LINES + b'{"b": [{"a": 1, "a" : 2}]}', "line 3 has the key `a` twice"),
        ("list.jsonl", LINES + b"[1, 2]", "line 3 is not an object"),
        ("deep.jsonl", LINES + b"[" * 100_000, "line 3 cannot be read: it is nested too deep"),
        ("deep.jsonl", b'{"a": ' * 1_010 + b"1" + b"}" * 1_010, "line 1 cannot be read: it is nested too deep"),
        ("latin.jsonl", LINES + b'{"a": "\xe9"}', "line 3 is not UTF-8"),
        ("utf16.jsonl", LINES.decode().encode("utf-16"), "the file is UTF-16"),
        ("utf16.csv", "a,b".encode("utf-16"), "the file is UTF-16"),
        ("cut.json", b'[{"a": 1},\n{"a": ', "line 2 is not JSON: it ends too early"),
        ("bad.json", b'[{"a": 1},\n{"a":\n x}]\n\n', "line 3 is not JSON: Expecting value"),
        ("open.json", b'[{"a": 1}\n', "line 2 is not JSON: it ends in the middle of a list"),
        ("comma.json", b'[{"a": 1}\n{"a": 1}]', "line 2 is not JSON: a comma"),
        ("more.json", b'[{"a": 1},]', "line 1 is not JSON: there is a comma behind the last row"),
        ("behind.json", b'[{"a": 1}]\nx', "line 2 is not JSON: there is something behind"),
        ("twice.json", b'[{"a": 1},\n{"a": 1, "a": 1}]', "line 2 has the key `a` twice"),
        ("latin.json", b'[{"a": 1},\n{"a": "\xe9"}]', "line 2 is not UTF-8"),
        ("ragged.csv", b'a,b\n"x\ny",1\n1,2,3\n', "line 4 has 3 fields, the header 2"),
        ("twice.csv", b"a,a\n1,2\n", "line 1 names the column `a` twice"),
        ("german.csv", b"a;b\n1;2\n", "separated by `;`"),
        ("open.csv", b'a,b\n1,2\n"x,3\n', "begins in line 3 cannot be read"),
        ("latin.csv", b"a,b\n1,\xe9\n", "line 2 is not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "the compressed file ends early"),
        ("cut.jsonl.xz", lzma.compress(LINES)[:-9], "the compressed file ends early"),
        ("cut.jsonl.zst", zstd(LINES)[:-3], "the compressed file ends early"),
        ("long.jsonl", b'{"a": ' + b"1" * 5_001 + b"}", "line 1 cannot be read: it has a number of more than 4,300 "),
        ("cr.csv", b"a,b\r1,2\r", "begins in line 1 has a carriage return"),
        ("no.parquet", LINES, "is no Parquet file"),
        ("no.arrow", LINES, "is no Arrow file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, content, said):
    with pytest.raises(BadFile, match=said):
        read(tmp_path, name, content)


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(BadFile, match="cannot be read: .* No such file"):
        list(read_file(tmp_path / "none.jsonl"))


def test_cells_are_text(tmp_path):
    rows = read(tmp_path, "rows.csv", b'\xef\xbb\xbfa,b\n001,true\nNA,"say ""hi"", \nyou"\n1e3,\n\n')
    assert rows == [{"a": "001", "b": "true"}, {"a": "NA", "b": 'say "hi", \nyou'}, {"a": "1e3", "b": None}]
    assert read(tmp_path, "rows.tsv", b"a\tb\n1,5\t2\n") == [{"a": "1,5", "b": "2"}]


def test_texts_are_lines(tmp_path):
    assert read(tmp_path, "rows.txt", "a\u2028b \r\n\nc".encode()) == [{"text": "a\u2028b "}, {"text": "c"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_nothing_is_no_rows(tmp_path, suffix):
    assert read(tmp_path, f"rows{suffix}", b"") == []


@pytest.mark.train  # the datasets library takes seconds to import
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_classes_have_their_names(tmp_path, suffix):
    from datasets import ClassLabel, Dataset, Features, List, Value

    from alignctl.data.raw import _each

    said = ClassLabel(names=["wanted", "unwanted"])
    features = Features({"label": said, "votes": List(said), "turns": List({"thumb": said, "text": Value("string")})})
    expected = [
        {"label": "unwanted", "votes": ["wanted", "unwanted"], "turns": [{"thumb": "unwanted", "text": "a"}]},
        {"label": "wanted", "votes": [], "turns": None},
        {"label": None, "votes": None, "turns": []},
    ]
    numbers = [
        {"label": 1, "votes": [0, 1], "turns": [{"thumb": 1, "text": "a"}]},
        {"label": 0, "votes": [], "turns": None},
        {"label": -1, "votes": None, "turns": []},
    ]
    rows = Dataset.from_list(numbers, features=features)
    assert [row for _, row in _each(rows)] == expected
    if suffix == ".parquet":
        rows.to_parquet(tmp_path / "rows.parquet")
        file = tmp_path / "rows.parquet"
    else:
        rows.save_to_disk(tmp_path / "saved")
        (file,) = (tmp_path / "saved").glob("*.arrow")
    assert list(read_file(file)) == expected


def test_a_column_that_is_there_twice(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    written = io.BytesIO()
    parquet.write_table(table, written)
    with pytest.raises(BadFile, match="the column `a` twice"):
        read(tmp_path, "rows.parquet", written.getvalue())


def test_rows_have_the_lines_in_which_they_begin(tmp_path):
    texts = {
        "rows.jsonl": '\n{"a": 1}\n\n{"a": 2}\n',
        "rows.json": '[\n{"a": 1}, {"a":\n2},\n{"a": 3}]',
        "rows.csv": 'a,b\n1,"two\nlines"\n3,4\n',
        "rows.txt": "one\n\nthree\n",
    }
    lines = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        lines[name] = [line for line, _ in read_placed(tmp_path / name)]
    assert lines == {"rows.jsonl": [2, 4], "rows.json": [2, 2, 4], "rows.csv": [2, 4], "rows.txt": [1, 3]}
