"""Each tracker is reported to by one training, which is continued, and its own reader finds what it was told."""

from __future__ import annotations

import os
import shutil

import pytest
from support.files import metrics, read
from support.processes import finish, start

pytestmark = [pytest.mark.train, pytest.mark.night]

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
ELSEWHERE = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME",
             "TRACKIO_DIR")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_data):
    """Three steps told to all of them, of which the last is taken again by a second command."""
    for name in NAMES:
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("run")
    (folder / "template").write_text(TEMPLATE)
    command = (
        "recipe=sft_quickstart", "model.scratch=null", f"model.path={shared_data / 'models' / 'stories260K'}",
        "model.chat_template=template", "data.limit=16", "data.eval_limit=8", "eval.prompts=2", "eval.max_new_tokens=4",
        "sft.max_steps=3", "sft.save_steps=1", "sft.save_total_limit=3", "rehearse=false", "log_every=1", "run_dir=run",
        "tracker.report_to=[tensorboard,wandb,mlflow,trackio]", "tracker.name=mine", "tracker.tags=[tiny,llama]",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for variable in ELSEWHERE:
            environment.delenv(variable, raising=False)
        environment.setenv("WANDB_MODE", "offline")
        finish(start(folder, *command))
        stage = folder / "run" / "sft"
        assert sorted(os.listdir(stage / "checkpoints"))[-1] == "checkpoint-3"
        for made in ("checkpoints/checkpoint-3", "model"):
            shutil.rmtree(stage / made)
        (stage / "result.json").unlink()
        assert "continues after step 2" in finish(start(folder, *command))
    return folder / "run"


@pytest.fixture
def losses(run):
    """Of each step."""
    return {row["step"]: pytest.approx(row["loss"]) for row in metrics(run / "sft") if "loss" in row}


@pytest.fixture
def result(run):
    return read(run / "sft" / "result.json")


def test_nothing_is_told_beside_the_run(run):
    assert {file.name for file in run.parent.iterdir()} == {"run", "template"}


def test_tensorboard_has_each_step_once(run, losses, result):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "sft"))
    events.Reload()
    assert {one.step: one.value for one in events.Scalars("train/loss")} == losses
    assert len(events.Scalars("train/loss")) == 3
    (before,) = events.Scalars("eval/before/loss")
    assert (before.step, before.value) == (0, pytest.approx(result["before"]["loss"]))
    (after,) = events.Scalars("eval/after/loss")
    assert (after.step, after.value) == (3, pytest.approx(result["after"]["loss"]))
    texts = {tag: events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode() for tag in
             ("name", "project", "tags", "config")}  # fmt: skip
    assert [texts[tag].strip() for tag in ("name", "project", "tags")] == ["mine-sft", "sft_quickstart", "tiny, llama"]
    assert "    seed: 42\n" in texts["config"]


def test_mlflow_goes_on_with_one_run(run, losses, result, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("sft_quickstart")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mine-sft"
    assert found.info.status == "FINISHED"
    assert {key: found.data.tags.get(key) for key in ("tiny", "llama")} == {"tiny": "true", "llama": "true"}
    assert found.data.metrics["eval_after/loss"] == pytest.approx(result["after"]["loss"])
    assert found.data.metrics["eval_before/loss"] == pytest.approx(result["before"]["loss"])
    assert {one.step: one.value for one in client.get_metric_history(found.info.run_id, "loss")} == losses
    assert found.data.params["learning_rate"]
    (config,) = run.glob(f"mlruns/{experiment.experiment_id}/{found.info.run_id}/artifacts/config.yaml")
    assert config.read_text() == (run / "config.yaml").read_text()


def test_trackio_goes_on_with_one_run(run, losses, result, tmp_path):
    from support.processes import run_script

    script = f"""
import json, os
os.environ["TRACKIO_DIR"] = {str(run / "trackio")!r}
from trackio.sqlite_storage import SQLiteStorage as Storage
(name,) = Storage.get_runs("sft_quickstart")
found = {{"name": name, "logs": Storage.get_logs("sft_quickstart", name),
         "config": Storage.get_run_config("sft_quickstart", name)}}
print(json.dumps(found, default=str), file=open("found.json", "w"))
"""
    run_script(script, tmp_path)
    found = read(tmp_path / "found.json")
    assert found["name"] == "mine-sft"
    assert found["config"]["tags"] == ["tiny", "llama"]
    assert found["config"]["config"]["sft"]["max_steps"] == 3
    rows = found["logs"]
    assert {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row} == losses
    (before,) = [row for row in rows if "eval/before/loss" in row]
    assert (before["train/global_step"], before["eval/before/loss"]) == (0, pytest.approx(result["before"]["loss"]))
    assert rows[-1]["eval/after/loss"] == pytest.approx(result["after"]["loss"])


def test_wandb_writes_both_parts_of_one_run(run):
    """It has no reader of its own for files that no server has: they are there, of one id, and larger than what tells
    of the run alone."""
    number = read(run / "trackers.json")["sft"]["wandb"]
    files = list(run.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        for said in (b"mine-sft", b"sft_quickstart", b"llama", b"eval/after/loss", b"train/loss"):
            assert said in content
