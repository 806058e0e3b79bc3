"""Why a write failed, and how much room there is."""

import errno
import resource
import subprocess
import sys

import pytest

from alignctl.run.disk import free_bytes, lack_of_room, shown_bytes


def test_room_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (16_060_000_000, "16.1 GB"), (5 * 10**15, "5,000.0 TB")],
)
def test_shown_bytes(count, shown):
    assert shown_bytes(count) == shown


def test_what_says_that_there_is_no_room(tmp_path):
    def behind(cause):
        error = RuntimeError("saving failed")
        error.__cause__ = cause
        return error

    full = "No space left on device"
    assert lack_of_room(OSError(errno.ENOSPC, full), tmp_path) == full
    assert lack_of_room(behind(OSError(errno.EDQUOT, "")), tmp_path) == "Disk quota exceeded"
    assert lack_of_room(Exception("while serializing: I/O error: (os error 28)"), tmp_path) == full
    assert lack_of_room(behind(OSError(errno.EACCES, "")), tmp_path) is None
    assert lack_of_room(Exception("(os error 13)"), tmp_path) is None


def test_a_file_that_was_cut_off_tells(tmp_path):
    """As torch leaves it, whose error says nothing."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"0" * 5000)
    error = RuntimeError("unexpected pos 576 vs 534")
    assert lack_of_room(error, tmp_path) is None
    # Where another process was the reason, it is part of a checkpoint that may be whole.
    assert [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()] == [5000]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        assert lack_of_room(error, tmp_path) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_command_says_so_without_a_traceback(tmp_path):
    """Files may have 1024 bytes; the plan has more."""
    command = f"ulimit -f 1; exec {sys.executable} -P -m alignctl train recipe=quickstart run_dir=run"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: there is no room left to write to: File too large\nhint: make room" in done.stderr
    assert "Traceback" not in done.stderr
