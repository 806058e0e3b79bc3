"""A reward server that goes away while a stage trains: what was drawn is kept, and the same command goes on."""

from __future__ import annotations

import pytest
from support.files import metrics, read, weights
from support.models import TINY
from support.processes import finish, start
from support.reward_server import serve_json

pytestmark = pytest.mark.train


def lengths(path, body):
    """Scores as a server gives them; one completion has none."""
    scores = [len(completion[0]["content"]) / 10 for completion in body["completions"]]
    return [None, *scores[1:]]


def command(port):
    return (
        "recipe=rlhf_quickstart", *TINY, "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null",
        f"ppo.reward_funcs=[http://127.0.0.1:{port}/lengths]", "ppo.normalize_rewards=running", "ppo.reward_retries=0",
        "ppo.per_device_train_batch_size=8", "ppo.response_length=8", "ppo.max_steps=6", "ppo.save_steps=2",
        "data.limit=64", "data.eval_limit=8", "eval.prompts=0", "log_every=1", "run_dir=run",
    )  # fmt: skip


def test_the_same_command_goes_on_where_the_server_went_away(tmp_path):
    """It scores three rollouts, and is back for the second command."""
    (tmp_path / "whole").mkdir()
    with serve_json(lengths) as (url, asked_by_whole):
        port = int(url.rpartition(":")[2])
        finish(start(tmp_path / "whole", *command(port)))
    whole = tmp_path / "whole" / "run" / "ppo"
    stage = tmp_path / "run" / "ppo"
    with serve_json(lambda path, body: lengths(path, body) if len(asked) <= 3 else 503, port) as (_, asked):
        err = finish(start(tmp_path, *command(port)), 1)
        assert f"http://127.0.0.1:{port}/lengths did not answer, asked once: 503 Service Unavailable" in err
        assert "what was drawn is kept" in err
    kept = read(stage / "drawn" / "rank_0.json")
    assert kept["step"] == 3
    checkpoints = sorted(file.name for file in (stage / "checkpoints").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]
    with serve_json(lengths, port) as (_, asked):
        err = finish(start(tmp_path, *command(port)))
    assert "continues after step 3" in err
    assert [one["body"] for one in asked] == [one["body"] for one in asked_by_whole[3:]]
    assert not (stage / "drawn" / "rank_0.json").exists()
    assert weights(stage / "model") == weights(whole / "model")
    rows = [
        [{key: row[key] for key in row if "tokens_per_s" not in key and key != "step_time"} for row in metrics(one)]
        for one in (stage, whole)
    ]
    assert rows[0] == rows[1]
    samples = (stage / "samples_while_training.jsonl").read_text()
    assert samples == (whole / "samples_while_training.jsonl").read_text()
    assert '"lengths": null' in samples
