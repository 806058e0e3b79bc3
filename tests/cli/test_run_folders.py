"""Commands about runs do not act on what a run directory says that others wrote."""

import os
import socket
import subprocess
import sys

import click
import pytest

from alignctl.cli import train
from alignctl.cli.runs import _log, cancel_command, resume_command
from alignctl.cli.status import status_command
from alignctl.cli.terminal import visible
from alignctl.cli.train import train_command
from alignctl.config.compose import compose, read_request
from alignctl.errors import LaunchError, RequestError
from alignctl.plan.freeze import find_run, fingerprints, freeze, refuse_left_behind
from alignctl.plan.plan import make_plan
from alignctl.run.files import read_json, write_json
from alignctl.run.paths import RunPaths
from alignctl.run.state import locked, read_status

RECIPE = ("recipe=quickstart", "stages=[sft]")
CONFIG, _ = compose(read_request(RECIPE))


def frozen(folder) -> RunPaths:
    plan = make_plan(CONFIG, "quickstart", folder)
    freeze(plan, CONFIG, [])
    return plan.paths


@pytest.fixture
def run(tmp_path):
    return frozen(tmp_path / "runs" / "quickstart" / "1")


def test_cancel_ends_no_process_that_is_not_the_run_s(run):
    process = subprocess.Popen([sys.executable, "-c", "input('alignctl')"], stdin=subprocess.PIPE)
    status = {"state": "running", "host": socket.gethostname(), "pid": process.pid, "stages": {}}
    write_json(run.status, status)
    with locked(run), pytest.raises(LaunchError, match=f"process {process.pid}, which .* is not the alignctl"):
        cancel_command(run.root, trusted=False)
    assert process.poll() is None
    process.communicate(b"\n")
    assert process.returncode == 0  # by itself


@pytest.mark.parametrize("job", ["--user=root", "1,2", "", "1 2", "1_0_0", "\u0661"])
def test_a_job_is_a_number(run, job):
    noted = {"state": "running", "job": {"id": job, "log": str(run.root / "log")}}
    write_json(run.status, {"state": "running", "stages": {"sft": noted}})
    with pytest.raises(RequestError, match="is no number of a job"):
        cancel_command(run.root, trusted=False)
    noted["job"]["id"] = "12_0"
    write_json(run.status, {"state": "running", "stages": {"sft": noted}})
    assert read_status(run)["stages"]["sft"]["job"]["id"] == "12_0"


def job_log(run, log):
    noted = {"state": "running", "job": {"id": "12", "log": str(log)}}
    write_json(run.status, {"state": "running", "stages": {"sft": noted}})
    return _log(run, "sft", None)


def test_logs_are_files_of_the_run(run, tmp_path):
    private, own = tmp_path / "id_rsa", run.stage("sft").job_log("12")
    private.write_text("private")
    own.parent.mkdir(parents=True)
    own.write_text("log")
    assert job_log(run, own) == own
    other = frozen(run.root.with_name("2")).stage("sft").job_log("12_0")
    assert job_log(run, other) == other  # of the first point of a sweep, whose array it is
    own.with_name("linked").symlink_to(private)
    os.mkfifo(own.with_name("pipe"))
    for log in (private, own.with_name("linked"), run.root / ".." / ".." / ".." / "id_rsa", own.with_name("pipe"),
                other.parents[1] / "model" / "x", run.root.parent, run.root):  # fmt: skip
        with pytest.raises(RequestError, match="is no log of"):
            job_log(run, log)


def test_control_characters_of_others_are_visible():
    assert visible("a\tb\x1b[2J\x07\x9b\x7f\r\n") == "a\tb^[[2J^G\\x9b^?^M\n"


def damage_plan(run):
    run.plan.write_text("{")


def newer_plan(run):
    plan = read_json(run.plan)
    plan["stages"][0]["config"] |= {"soul": "new"}
    write_json(run.plan, plan)


def unusable_plan(run):
    plan = read_json(run.plan)
    plan["stages"][0]["config"]["data"]["mix"] = [{}]
    write_json(run.plan, plan)


def pipe_for_plan(run):
    run.plan.unlink()
    os.mkfifo(run.plan)


def other_status(run):
    write_json(run.status, {"state": 3})


def other_result(run):
    run.stage("sft").root.mkdir()
    run.stage("sft").result.write_text("[]")


def other_ledger(run):
    run.stage("sft").root.mkdir()
    run.stage("sft").data.write_text("[]")


def other_manifest(run):
    write_json(run.stage("sft").rows.manifest, {"files": 3})
    write_json(run.stage("sft").inputs, {"rows_from": "sft", "files": {}})
    write_json(run.stage("sft").result, {})


DAMAGES = (
    damage_plan, newer_plan, unusable_plan, pipe_for_plan, other_status, other_result, other_ledger, other_manifest,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_cannot_be_read_is_skipped_and_named(run, tmp_path, monkeypatch, capsys, damage):
    good = frozen(run.root.with_name("0"))
    damage(run)
    monkeypatch.chdir(tmp_path)
    status_command([], every=True, as_json=False)
    said = capsys.readouterr()
    assert "runs/quickstart/0" in said.out
    assert "runs/quickstart/1" not in said.out
    assert f"{run.root} is skipped: " in " ".join(said.err.split())
    with pytest.raises(RequestError):
        status_command([run.root], every=False, as_json=False)
    if damage in (damage_plan, newer_plan, pipe_for_plan):
        wanted = make_plan(CONFIG, "quickstart", tmp_path / "new")
        assert find_run("quickstart", tmp_path / "runs", fingerprints(wanted)) in (good.root, run.root)
        refuse_left_behind(wanted, tmp_path / "runs", CONFIG)


def test_a_run_directory_that_everybody_may_write_is_not_acted_on(run):
    run.root.chmod(0o777)
    again = [*RECIPE, f"run_dir={run.root}"]
    nothing = {"recipe_dirs": [], "dry_run": True, "multirun": False, "new": False, "as_json": False}
    for act in (
        lambda: cancel_command(run.root, trusted=False),
        lambda: resume_command(run.root, trusted=False),
        lambda: train_command(again, **nothing),
    ):
        with pytest.raises(LaunchError, match="may be written to by everybody"):
            act()
    train_command(again, **nothing, trusted=True)
    with pytest.raises(LaunchError, match="is not at work"):
        cancel_command(run.root, trusted=True)


def test_the_folder_of_a_run_that_is_refused_before_it_begins_is_removed(tmp_path, monkeypatch):
    def refuse(folder, *_):
        assert folder.is_dir()
        raise LaunchError("refused")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "refuse_others", refuse)
    with pytest.raises(LaunchError, match="refused"):
        train_command(RECIPE, recipe_dirs=[], dry_run=False, multirun=False, new=True, as_json=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "quickstart"]


def test_the_option_is_one_of_every_command_that_acts():
    from alignctl.cli.main import cli

    for name in ("train", "submit", "resume", "cancel"):
        command = cli.get_command(click.Context(cli), name)
        assert any("--trust-run-dir" in option.opts for option in command.params)
