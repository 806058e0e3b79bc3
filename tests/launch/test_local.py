"""What becomes of stages when one before them is made anew, or their folder is taken away, and of processes when
others fail."""

import dataclasses
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from support.added import add_method

from alignctl.config.compose import compose, read_request
from alignctl.errors import AlignctlError, Interrupted, LaunchError, RequestError
from alignctl.launch import local
from alignctl.launch.local import FolderGone, _begin_anew_after, _lead
from alignctl.plan.freeze import freeze
from alignctl.plan.plan import make_plan
from alignctl.run import products
from alignctl.run.files import write_json, write_text
from alignctl.run.fingerprint import listed
from alignctl.run.products import check_models
from alignctl.run.state import is_done, read_status


class Said(list):
    def say(self, text):
        self.append(text)

    def progress(self, stage, progress):
        pass


def test_what_stands_on_a_stage_that_begins_anew_does_so_too(tmp_path, monkeypatch):
    add_method(monkeypatch, "pick", "sft", product="rows", makes="demonstrations")
    config, problems = compose(
        read_request(
            [
                "recipe=sft_dpo_ppo_quickstart", "sft.method=pick", "rm.from=null", "dpo.from=null",
                "dpo.data.from=sft",
            ]
        )
    )  # fmt: skip
    assert not problems
    plan = make_plan(config, "r", tmp_path)
    for stage in plan.stages:
        folders = plan.paths.stage(stage.config.name)
        write_json(folders.result, {})
        folders.model.mkdir()
    by_name = {stage.config.name: stage for stage in plan.stages}
    assert by_name["ppo"].config.start_from == "dpo"
    said = Said()
    _begin_anew_after(plan, by_name["dpo"], said)
    assert {name: is_done(plan.paths.stage(name)) for name in by_name} == {
        "sft": True, "rm": True, "dpo": True, "ppo": False,
    }  # fmt: skip
    assert said == ["dpo: the rows of `sft` are others now, so it begins anew, and after it `ppo`"]


def test_what_we_kill_ourselves_was_not_out_of_memory(tmp_path, monkeypatch):
    """A machine whose processes do not end though those of another have failed."""
    monkeypatch.setattr(local, "_LAST_WORDS_S", 1)
    config, _ = compose(read_request(["recipe=quickstart", "launcher=slurm", "launcher.nodes=2", "distributed=ddp"]))
    plan = make_plan(config, "r", tmp_path)
    paths = plan.paths.stage("sft")
    paths.ranks.mkdir(parents=True)
    failed = f"echo {{}} >{paths.exit_codes(1)}; echo waits; sleep 60"
    stage = dataclasses.replace(plan.stages[0], command=("sh", "-c", failed))
    began = time.monotonic()
    with pytest.raises(AlignctlError, match="those on this machine did not end by themselves; the end of") as raised:
        local._wait(stage, paths, tmp_path / "log", Said())
    assert time.monotonic() < began + 30
    assert "signal" not in str(raised.value)
    assert "waits" in str(raised.value)


class Silent(Said):
    def started(self, *_):
        pass

    finished = progress = started


def test_what_a_worker_finds_before_its_first_heartbeat_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DOOR_KEY", "0123456789abc")
    config, _ = compose(read_request(["recipe=quickstart", "sft.run_name='${oc.env:DOOR_KEY}'"]))
    plan = make_plan(config, "quickstart", tmp_path)
    freeze(plan, config, [])
    monkeypatch.delenv("DOOR_KEY")
    with pytest.raises(RequestError, match="stage `sft`: `sft` takes the variable DOOR_KEY of the environment"):
        _lead(plan, plan.stages[0], Silent())


def reads_a_model(tmp_path, monkeypatch, *overrides):
    """A plan whose second stage takes a model that is read for a while."""
    monkeypatch.setattr(products, "_LARGE", 1)
    config, _ = compose(read_request(["recipe=quickstart", *overrides]))
    plan = make_plan(config, "quickstart", tmp_path)
    model = plan.paths.stage("sft").model
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"12345")
    write_json(model / "manifest.json", {"files": listed(model)})
    return plan, plan.stages[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_ends_the_reading_of_a_model(tmp_path, monkeypatch, number):
    class Stops(Silent):
        def say(self, text):
            os.kill(os.getpid(), number)

    plan, stage = reads_a_model(tmp_path, monkeypatch)
    with pytest.raises(Interrupted, match="stage `dpo`, before it had anything to save"):
        _lead(plan, stage, Stops())
    assert read_status(plan.paths)["stages"]["dpo"]["state"] == "interrupted"
    assert not plan.paths.stage("dpo").checked.exists()


def test_other_machines_wait_while_the_first_reads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_READ_POLL_S", 0.01)
    plan, stage = reads_a_model(tmp_path, monkeypatch, "launcher.nodes=2", "launcher.rdzv_endpoint=a:1")
    paths = plan.paths.stage("dpo")
    first = threading.Timer(0.2, check_models, [stage.config, paths, Said().say])
    first.start()
    assert local._first_goes_on(stage, paths)
    assert paths.checked.exists()
    first.join()
    paths.checked.unlink()
    write_text(paths.ended(0), "")
    assert not local._first_goes_on(stage, paths)
    paths.ended(0).unlink()
    monkeypatch.setattr(local, "_FIRST_S", 0)
    with pytest.raises(LaunchError, match="has not read .*model.safetensors within 0 s"):
        local._first_goes_on(stage, paths)


@pytest.mark.parametrize("how", ["removed", "renamed", "another"])
def test_a_run_directory_that_is_taken_away_ends_the_run_with_a_word(tmp_path, how):
    config, _ = compose(read_request(["recipe=quickstart"]))
    plan = make_plan(config, "quickstart", tmp_path / "run")
    plan.paths.make_root()
    worker = (sys.executable, "-c", "import time; time.sleep(600)")
    stage = dataclasses.replace(plan.stages[0], command=worker)
    folder = plan.paths.stage(stage.config.name).root

    def take_away():
        while not any(folder.glob("logs/*/rank_0.log")):
            time.sleep(0.01)
        if how == "removed":
            shutil.rmtree(tmp_path / "run")
        else:
            (tmp_path / "run").rename(tmp_path / "moved")
        if how == "another":
            folder.mkdir(parents=True)

    thread = threading.Thread(target=take_away)
    thread.start()
    with pytest.raises(FolderGone, match="was removed, renamed or unmounted while the stage was at work"):
        _lead(plan, stage, Silent())
    thread.join()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name == "status.json") == (
        [] if how == "removed" else ["status.json"]
    )
    assert (tmp_path / "run").exists() == (how == "another")  # nothing was made anew in its place
