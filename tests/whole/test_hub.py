"""Models and data by Hub id, from a server on this machine; and what is asked of it."""

from __future__ import annotations

import json

import pytest
from support.hub_server import serve_hub

pytestmark = [pytest.mark.train, pytest.mark.spread(2)]

SHORT = ("data.eval_rows=4", "eval.prompts=2", "eval.max_new_tokens=8", "dpo.max_steps=2", "run_dir=run", "--json")


@pytest.fixture
def repos(shared_data):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    model = shared_data / "models" / "stories260K"
    return {
        "datasets/owner/pairs": {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()},
        "models/owner/model": {file.name: file.read_bytes() for file in model.iterdir()},
    }


@pytest.fixture
def train_from(alignctl, tmp_path, monkeypatch):
    """Trains from a Hub that has some repositories; gives the finished command and the paths it asked for."""

    def run(repos, data: str):
        with serve_hub(repos) as (address, asked):
            monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
            monkeypatch.setenv("HF_ENDPOINT", address)
            monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
            done = alignctl("train", "recipe=dpo_local", "model.path=owner/model", f"data.path={data}", *SHORT)
        return done, asked

    return run


def test_model_and_data_by_id(repos, train_from):
    done, asked = train_from(repos, "owner/pairs")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["stages"]["dpo"]["rows"]
    assert (rows["train"]["kept"], rows["eval"]["kept"]) == (16, 4)
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert any(path.endswith("/train.jsonl") for path in asked)
    assert not [path for path in asked if "telemetry" in path]


def test_an_id_that_does_not_exist(repos, train_from):
    done, _ = train_from(repos, "owner/pears")
    assert done.code == 1
    assert "cannot read owner/pears" in done.err
    assert "is the id right" in done.err
    assert "Traceback" not in done.err


def test_weights_that_are_code_are_refused(repos, train_from):
    """A pickle can run code when it is loaded."""
    repos["models/owner/model"]["pytorch_model.bin"] = repos["models/owner/model"].pop("model.safetensors")
    done, asked = train_from(repos, "owner/pairs")
    assert done.code == 1
    assert "weights must be safetensors" in done.err
    assert not [path for path in asked if path.endswith("/pytorch_model.bin")]
