"""Trackers as they fail: told before anything is loaded, or left alone while training goes on. That each has what it is
told is tested in whole/test_reported.py."""

from __future__ import annotations

import shutil
from contextlib import suppress

import pytest
from support.files import read
from support.in_process import frozen
from support.processes import run_script
from support.small import Small
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignctl.errors import LaunchError, Stopped
from alignctl.monitor import trackers as module
from alignctl.monitor.callbacks import MetricsFile
from alignctl.monitor.trackers import About, TensorBoard, Tracker, Trackers, reporting
from alignctl.run.frozen import read_stage
from alignctl.run.paths import StagePaths

pytestmark = pytest.mark.train


@pytest.fixture
def stage(tmp_path):
    """Of a run that was frozen, and its files; which trackers it has is given."""

    def make(*names: str):
        plan = frozen(tmp_path / "run", "recipe=quickstart", f"tracker.report_to=[{','.join(names)}]")
        return read_stage(plan.paths, "sft")[0], plan.paths

    return make


class Away:
    """The integration of a tracker whose server is away, at some steps."""

    def __init__(self, *steps: int):
        self.asked, self._steps = [], steps

    def on_log(self, args, state, control, logs, **kwargs):
        self.asked.append(state.global_step)
        if state.global_step in self._steps:
            raise ConnectionError("nobody\nthere")

    def __getattr__(self, event):
        return lambda *args, **kwargs: None


def trained_beside(folder, stage, integration):
    """The steps in metrics.jsonl, and what was told, of an SFT of four steps that reports to one tracker."""
    pytest.importorskip("tensorboard")
    tracker = Tracker("tensorboard", About("quickstart", "run", *stage("tensorboard")))
    tracker.callback = integration
    of_stage, told = StagePaths(folder / "sft"), []
    small, trackers = Small(of_stage.checkpoints), Trackers([tracker], told.append)
    trainer = small.trainer(
        "sft", per_device_train_batch_size=2, save_strategy="no", rows=small.rows("demonstrations", 8), logging_steps=1,
        max_steps=4,
    )  # fmt: skip
    trainer.add_callback(MetricsFile(of_stage, told.append))
    trainer.add_callback(trackers)
    trainer.train()
    trackers.report(trainer, {"after": {"loss": 1.0}})
    trackers.close(failed=False)
    return [row["step"] for row in read(of_stage.metrics) if "loss" in row], told


def test_one_that_fails_is_left_alone_and_training_goes_on(tmp_path, stage):
    away = Away(2, 3, 4)
    steps, told = trained_beside(tmp_path, stage, away)
    assert steps == [1, 2, 3, 4]
    assert away.asked == [1, 2]
    assert told == [
        "the tracker `tensorboard` failed: nobody there; the stage goes on, and metrics.jsonl has all",
    ]


def test_it_is_asked_again_after_a_rest_and_told_of_once(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(module, "_REST_S", 0)
    away = Away(2, 3)
    _, told = trained_beside(tmp_path, stage, away)
    assert away.asked == [1, 2, 3, 4, 4, 4]  # the last two: the summary of training, and what was measured after it
    assert len(told) == 1


def test_one_that_cannot_be_started_ends_the_run_before_it_begins(stage, monkeypatch, free_port):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings, paths = stage("tensorboard", "mlflow")
    with (
        pytest.raises(LaunchError, match="tracker `mlflow` failed: .*127.0.0.1") as caught,
        reporting(settings, paths, print),
    ):
        pytest.fail("it was begun")
    assert "MLFLOW_TRACKING_URI" in caught.value.problems[0].hint
    assert not paths.trackers.exists()


def test_one_without_a_login_ends_the_run_before_it_begins(stage, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, paths = stage("wandb")
    with pytest.raises(LaunchError, match="No API key") as caught, reporting(settings, paths, print):
        pytest.fail("it was begun")
    assert "WANDB_MODE=offline" in caught.value.problems[0].hint


def test_a_run_that_was_told_before_goes_on_without_one_that_cannot_be_started(stage, monkeypatch, free_port):
    pytest.importorskip("mlflow")
    settings, paths = stage("tensorboard")
    with reporting(settings, paths, print):
        assert read(paths.trackers) == {"sft": {}}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings, told = stage("mlflow")[0], []
    with reporting(settings, paths, told.append):
        pass
    assert len(told) == 1
    assert "the tracker `mlflow` failed" in told[0]
    assert read(paths.trackers) == {"sft": {}}


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (Stopped("stopped"), "FINISHED"), (ValueError("broken"), "FAILED")]
)
def test_the_end_of_a_stage_is_that_of_its_run(stage, monkeypatch, tmp_path, error, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "there").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings, paths = stage("mlflow")
    with suppress(Stopped, ValueError), reporting(settings, paths, print):
        if error:
            raise error
    number = read(paths.trackers)["sft"]["mlflow"]
    assert mlflow.MlflowClient().get_run(number).info.status == status
    assert not paths.mlruns.exists()


def test_files_that_are_lost_while_a_stage_reports_end_nothing(stage, monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "there").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings, paths = stage("mlflow")
    told = []
    with reporting(settings, paths, told.append):
        shutil.rmtree(tmp_path / "there")
    assert len(told) == 1
    assert "the tracker `mlflow` failed" in told[0]


def test_stages_that_share_a_folder_of_tensorboards_hide_no_steps_of_each_other(stage, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "~/curves")
    tracker = TensorBoard("tensorboard", About("quickstart", "mine", *stage("tensorboard")))
    tracker.begin(TrainingArguments(str(tmp_path)), TrainerState(is_world_process_zero=True), TrainerControl())
    assert [folder.name for folder in (tmp_path / "curves").iterdir()] == ["mine-sft"]


STOPPED = """
import os, sys, time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from accelerate import PartialState

from alignctl.errors import Stopped
from alignctl.monitor import trackers
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths
from alignctl.stage.run import _reporting

class Slow(trackers.TensorBoard):
    def end(self, failed):
        time.sleep(2)
        Path("told").touch()

trackers._KINDS["tensorboard"] = Slow
PartialState(cpu=True)
paths = RunPaths(Path(sys.argv[1]))
progress = SimpleNamespace(phase=print, notice=print)
job = SimpleNamespace(stage=read_stage(paths, "sft")[0], paths=paths.stage("sft"), progress=progress)
with suppress(Stopped), _reporting(job):
    raise Stopped("stopped")
assert Path("told").exists(), os.environ["RANK"]
"""


@pytest.mark.night
def test_a_stop_waits_for_what_trackers_are_told(stage, tmp_path):
    """In the processes that tell them nothing: with the first that leaves, torchrun ends the others."""
    pytest.importorskip("tensorboard")
    run_script(STOPPED, tmp_path, stage("tensorboard")[1].root, processes=2)
