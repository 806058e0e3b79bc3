"""Files of text on the Hub are read as files here are: a server on this machine, asked by a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from support.hub_server import serve_hub

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

README = b"""---
configs:
- config_name: pairs
  data_files:
  - split: train
    path: one/*.jsonl
  - split: test
    path: two.jsonl
- config_name: apart
  data_files: three.csv
  sep: ";"
---
"""
READ = """
import json, sys
from alignctl.data.reading import read_split
from alignctl.data.settings import DataSettings
from alignctl.errors import AlignctlError
for given in json.loads(sys.argv[1]):
    try:
        rows = read_split(DataSettings(path="owner/set", eval_rows=0, **given), "demonstrations", 0)[0]
        print(json.dumps([[row["prompt"], row["completion"]] for row in rows.dataset]))
    except AlignctlError as error:
        print(json.dumps(str(error)))
"""


def read(environment, *given):
    script = [sys.executable, "-c", READ, json.dumps(given)]
    done = subprocess.run(script, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_of_a_configuration_and_a_split(tmp_path):
    """What looks like a date or a number stays what it is, there and in what is kept for later, without the Hub."""
    rows = [["2024-01-0" + str(i), "007"] for i in range(1, 9)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
    files = {
        "README.md": README,
        "one/a.jsonl": "\n".join(lines[:5]).encode(),
        "one/b.jsonl": "\n".join(lines[5:]).encode(),
        "two.jsonl": b'{"prompt": "01", "completion": "2024-01-01"}',
        "three.csv": b"prompt;completion\nx;y\n",
        "rest.bin": b"",
    }
    home = {"HF_HOME": str(tmp_path / "home"), "ALIGNCTL_CACHE": str(tmp_path / "cache")}
    pairs = {"name": "pairs"}
    with serve_hub({"datasets/owner/set": files}) as (address, asked):
        found = read(
            home | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
            pairs,
            pairs | {"split": "train[:50%]"},
            pairs | {"split": "test+train[6:]"},
            pairs | {"split": "dev"},
            {},
        )
    assert found[:3] == [rows, rows[:4], [["01", "2024-01-01"], *rows[6:]]]
    assert "there is no split `dev`; there is train, test" in found[3]
    assert "choose one with `data.name=...`" in found[4] or "several configurations" in found[4]
    assert not [path for path in asked if path.endswith(("three.csv", "rest.bin"))]
    assert read(home | {"HF_HUB_OFFLINE": "1", "ALIGNCTL_CACHE": str(tmp_path / "new")}, pairs) == [rows]
