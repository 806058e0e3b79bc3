"""Which files a path means."""

import json

import pytest

from alignctl.config.compose import compose, read_request
from alignctl.config.stages import stage_config
from alignctl.data.files import BadFile
from alignctl.data.sources import files_of
from alignctl.plan.freeze import absolute_paths


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fill(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": name}) + "\n")
        return tmp_path

    return fill


def test_a_folder_a_pattern_and_a_list_give_files_in_order(folder):
    folder(
        "rows/b.jsonl", "rows/a.jsonl", "rows/more/c.jsonl", "rows/README.md", "rows/.cache/d.jsonl", "rows[1].jsonl"
    )
    for path, expected in (
        ("rows", ["a.jsonl", "b.jsonl", "c.jsonl"]),
        ("rows/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("rows/**/*.jsonl", ["a.jsonl", "b.jsonl", "c.jsonl"]),
        (["rows/b.jsonl", "rows/more"], ["b.jsonl", "c.jsonl"]),
        ("rows[1].jsonl", ["rows[1].jsonl"]),
    ):
        assert [file.name for file in files_of(path)] == expected


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["d/a.md"], "d", "no file of rows in this folder"),
        (["d/a.jsonl", "d/b.csv"], "d", "files of several kinds: .csv, .jsonl"),
        (["d/train.jsonl", "d/test.jsonl"], "d", "test.jsonl beside train.jsonl"),
        (["d/train/0.jsonl", "d/test/0.jsonl"], "d", "test/0.jsonl beside train/0.jsonl"),
        (["d/a.jsonl"], "d/*.csv", "no file matches"),
        (["d/a.jsonl", "d/b.md"], "d/*", "cannot read `.md`"),
        (["a.jsonl"], ["a.jsonl", "./a.jsonl"], "a.jsonl is named twice"),
        (["a.jsonl"], ["a.jsonl", "b.jsonl"], "no such file"),
        ([], [], "no file is named"),
    ],
)
def test_there_is_no_telling_which_files_are_meant(folder, names, path, expected):
    folder(*names)
    with pytest.raises(BadFile, match=expected):
        files_of(path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "d/train-*.jsonl"),
        (["train", "test"], "d/train.jsonl"),
        (["a", "b", "test"], "d/a.jsonl"),
    ],
)
def test_the_files_of_the_split_are_named(folder, names, hint):
    folder(*(f"d/{name}.jsonl" for name in names))
    with pytest.raises(BadFile) as refused:
        files_of("d")
    assert refused.value.hint == f"name those that are: `{hint}`"


def test_a_packing_that_is_not_read_is_named(folder):
    folder("a.jsonl.bz2")
    with pytest.raises(BadFile, match="cannot read `.bz2`") as refused:
        files_of("a.jsonl.bz2")
    assert "unpack it, or pack it as .gz, .xz or .zst" in refused.value.hint


def test_every_file_of_a_folder_is_an_input(folder):
    """One that changes, or comes, makes another stage."""
    root = folder("rows/a.jsonl", "rows/b.jsonl", "held.jsonl")
    given = ["recipe=dpo_local", "model.path=a/b", "data.path=rows/*.jsonl", "data.eval_path=[held.jsonl]"]
    stage = stage_config(absolute_paths(compose(read_request(given))[0]), "dpo")
    assert {key: path for key, path in stage.inputs.items() if key.startswith("data")} == {
        "data.path.0": str(root / "rows" / "a.jsonl"),
        "data.path.1": str(root / "rows" / "b.jsonl"),
        "data.eval_path": str(root / "held.jsonl"),
    }
