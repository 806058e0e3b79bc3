"""What others put into a run directory leads nowhere, and theirs is not taken for one of ours."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignctl.errors import LaunchError
from alignctl.monitor.heartbeat import Heartbeat
from alignctl.run.checkpoints import STAGING, finish_staged
from alignctl.run.files import append_json_lines, keep_steps, publish_folder, read_json, read_json_lines, write_json
from alignctl.run.hashed import write_hashed
from alignctl.run.owner import is_others, refuse_others, take_away
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.products import begin_anew
from alignctl.run.state import is_held, locked, works_on


def lock(path):
    with locked(RunPaths(path.parent)):
        pass


def beat(path):
    Heartbeat(StagePaths(path.parents[1]), 0)


def set_aside(path):
    (path.parent / "rows.jsonl").write_text("torn\n")
    keep_steps(path.parent / "rows.jsonl", lambda step: True)


WRITES = {
    lock: ".lock",
    lambda path: append_json_lines(path, [{"step": 1}]): "metrics.jsonl",
    lambda path: write_hashed(path, lambda file: file.write(b"x")): "model.safetensors",
    beat: "ranks/node_0_beats",
    set_aside: "rows.jsonl.damaged",
}


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("write", WRITES, ids=WRITES.values())
def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path, kind, write):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / "run" / WRITES[write]
    path.parent.mkdir(parents=True)
    path.symlink_to(mine) if kind == "link" else os.mkfifo(path)
    with pytest.raises(LaunchError, match=f"{path} is a link, a pipe or a device"):
        write(path)
    assert mine.read_text() == "mine"


def test_a_file_that_is_replaced_was_written_under_a_name_that_nobody_can_guess(tmp_path, monkeypatch):
    mine, path = tmp_path / "mine", tmp_path / "status.json"
    mine.write_text("mine")
    path.symlink_to(mine)
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, other: (names.append(self.name), replace(self, other))[1])
    for _ in range(2):
        write_json(path, {})
    assert len(set(names)) == 2
    assert (mine.read_text(), path.is_symlink(), read_json(path)) == ("mine", False, {})
    with pytest.raises(TypeError):
        write_json(path, {1, 2})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine", "status.json"]


def test_what_is_read_answers(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "pipe") is None
    assert read_json_lines(tmp_path / "pipe") == []
    os.mkfifo(tmp_path / ".lock")
    assert not is_held(RunPaths(tmp_path))


def test_a_folder_is_not_staged_or_published_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    (mine / "checkpoint-1").mkdir(parents=True)
    (tmp_path / STAGING).symlink_to(mine)
    finish_staged(tmp_path)
    assert not (tmp_path / STAGING).is_symlink()
    (tmp_path / "staged").mkdir()
    (tmp_path / "model").symlink_to(mine)
    publish_folder(tmp_path / "staged", tmp_path / "model")
    assert not (tmp_path / "model").is_symlink()
    assert (mine / "checkpoint-1").is_dir()


def test_a_lock_that_is_removed_does_not_let_a_second_one_in(tmp_path):
    paths = RunPaths(tmp_path)
    with locked(paths):
        paths.lock.unlink()
        assert is_held(paths)
        with pytest.raises(LaunchError, match="another alignctl is working on"), locked(paths):
            pass
        paths.lock.unlink()
        paths.lock.write_text("another")
        assert is_held(paths)
    assert not is_held(paths)


def test_a_run_is_held_where_only_files_that_are_written_have_locks(tmp_path, monkeypatch):
    """As over NFS, flock(2)."""
    flock = fcntl.flock

    def as_nfs(opened, how):
        if not fcntl.fcntl(opened, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "not open for writing")
        flock(opened, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    paths = RunPaths(tmp_path)
    with locked(paths):
        assert is_held(paths)
    assert not is_held(paths)


def test_a_lock_is_not_emptied(tmp_path):
    (tmp_path / ".lock").write_text("of somebody")
    with locked(RunPaths(tmp_path)):
        assert (tmp_path / ".lock").read_text() == "of somebody"


@contextmanager
def not_root():
    """As one who is not root, who owns this folder."""
    user = os.geteuid()
    os.seteuid(user or 4321)
    try:
        yield Path("/")
    finally:
        os.seteuid(user)


def test_a_stage_does_not_begin_anew_beside_what_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "checkpoints").chmod(0o555)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # folders above are for their owner alone
    with not_root():
        take_away(Path("checkpoints"))
        with pytest.raises(PermissionError):
            begin_anew(StagePaths(Path()))
    assert (tmp_path / "checkpoints" / "checkpoint-1").exists()
    (tmp_path / "checkpoints").chmod(0o755)
    begin_anew(StagePaths(Path()))
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_of_another_user_is_refused():
    said = []
    with not_root() as theirs:
        with pytest.raises(LaunchError, match=r"belongs to .*, not to you") as refused:
            refuse_others(theirs, False, said.append)
        assert "--trust-run-dir" in str(refused.value)
        assert is_others(theirs)
        refuse_others(theirs, True, said.append)
    assert said == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give folders away")
def test_root_is_not_asked(tmp_path):
    os.chown(tmp_path, 4321, -1)
    refuse_others(tmp_path, False, pytest.fail)


def test_a_run_directory_that_others_may_write_is_refused_or_said_to_be_one(tmp_path):
    said = []
    refuse_others(tmp_path / "none", False, said.append)
    tmp_path.chmod(0o755)
    refuse_others(tmp_path, False, said.append)
    assert said == []
    tmp_path.chmod(0o775)
    refuse_others(tmp_path, False, said.append)
    assert len(said) == 1
    assert f"all of its group may write to {tmp_path}" in said[0]
    tmp_path.chmod(0o1777)
    with pytest.raises(LaunchError, match="may be written to by everybody"):
        refuse_others(tmp_path, False, said.append)
    refuse_others(tmp_path, True, said.append)
    assert len(said) == 1


def test_where_the_file_system_gives_owner_and_mode_by_itself_that_says_nothing(tmp_path, monkeypatch):
    """As it is on CIFS: whatever is made there is open to everybody."""
    monkeypatch.setattr(Path, "stat", lambda self, **_: os.stat_result((0o40777, 0, 0, 2, 0, 0, 0, 0, 0, 0)))
    said = []
    refuse_others(tmp_path, False, said.append)
    assert [f"the file system gives owner and mode of {tmp_path} by itself" in one for one in said] == [True]
    assert not is_others(tmp_path)
    assert os.listdir(tmp_path) == []


WORKS = """
import sys
from pathlib import Path
from alignctl.run.paths import RunPaths
from alignctl.run.state import locked
with locked(RunPaths(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_is_the_one_that_works_on_a_run_if_it_holds_it(tmp_path):
    paths = RunPaths(tmp_path)
    command = [sys.executable, "-c", WORKS, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert works_on(paths, process.pid)
        assert not works_on(RunPaths(tmp_path.parent), process.pid)
        process.stdin.close()
    assert not any(works_on(paths, pid) for pid in (os.getpid(), process.pid, 0, -1))
