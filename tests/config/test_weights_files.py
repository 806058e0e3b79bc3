"""A download that was cut short is told from a whole one by headers and sizes."""

from __future__ import annotations

import json

import pytest

from alignctl.config.weights import find_broken

INDEX = "model.safetensors.index.json"


def write(file, numbers=4, cut=0):
    header = json.dumps({"a": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4 * numbers)
    file.write_bytes(content[: len(content) - cut])


def index(folder, *names):
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"w{at}": name for at, name in enumerate(names)}}))


def test_whole_files(tmp_path):
    assert find_broken(tmp_path) is None  # others ask whether there are any
    write(tmp_path / "model.safetensors")
    assert find_broken(tmp_path) is None
    write(tmp_path / "one.safetensors")
    index(tmp_path, "one.safetensors", "one.safetensors")
    assert find_broken(tmp_path) is None


@pytest.mark.parametrize("cut", [1, 16, 20, 60, 400])
def test_a_file_that_ends_early(tmp_path, cut):
    write(tmp_path / "model.safetensors", cut=cut)
    assert "model.safetensors has " in find_broken(tmp_path)


def test_a_file_that_is_missing(tmp_path):
    write(tmp_path / "one.safetensors")
    index(tmp_path, "one.safetensors", "two.safetensors")
    assert find_broken(tmp_path) == f"two.safetensors is missing, which {INDEX} names"
    assert find_broken(tmp_path, whole=False) is None  # the rest is still on the Hub


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_damaged(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    assert find_broken(tmp_path) == f"{INDEX} is damaged"
