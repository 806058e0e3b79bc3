"""What is made of rows is made once: by one process of several, whole or not at all, and anew of a changed source."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from alignctl.data.kept import kept
from alignctl.data.reading import read_split
from alignctl.data.settings import DataSettings
from alignctl.errors import RequestError

pytestmark = pytest.mark.train  # the datasets library takes seconds to import

PROCESSES = 4
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(path=str(path), eval_rows=4)


def pairs(count, word="good"):
    return [{"prompt": f"p{i}", "chosen": f"{word} {i}", "rejected": f"bad {i}"} for i in range(count)]


def read_counted(settings, barrier, read):
    barrier.wait()
    rows, held = read_split(settings, "preferences", 0, count=lambda more: read.put(more))
    assert (len(rows.dataset), len(held.dataset)) == (3996, 4)


def test_of_processes_that_read_at_once_one_reads(tmp_path):
    settings = write(tmp_path / "rows.jsonl", pairs(4000))
    barrier, read = FORK.Barrier(PROCESSES), FORK.SimpleQueue()
    readers = [FORK.Process(target=read_counted, args=(settings, barrier, read)) for _ in range(PROCESSES)]
    for reader in readers:
        reader.start()
    counted = sum(read.get() for _ in range(4))  # it is told of a thousand at a time
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * PROCESSES
    assert counted == 4000
    assert read.empty()


def test_rows_that_are_found_are_those_that_were_read(tmp_path):
    settings = write(tmp_path / "rows.jsonl", [*pairs(30), {"prompt": "p", "chosen": "", "rejected": "x"}, *pairs(20)])
    first, again = (read_split(settings, "preferences", 0) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert list(one.dataset) == list(other.dataset)
        assert (one.numbers, one.ledger, one.format, one.columns) == (
            other.numbers, other.ledger, other.format, other.columns,
        )  # fmt: skip
    assert list(again[0].ledger.skipped) == [31]
    assert 31 not in again[0].numbers


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    settings = write(tmp_path / "rows.jsonl", pairs(10))
    with pytest.raises(RequestError, match="the file was changed while it was read"):
        read_split(settings, "preferences", 0, count=lambda more: write(tmp_path / "rows.jsonl", pairs(10, "best")))


def test_a_cache_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "rows.jsonl" / "cache"))
    settings = write(tmp_path / "rows.jsonl", pairs(10))
    with pytest.raises(RequestError, match="the cache .* cannot be made") as refused:
        read_split(settings, "preferences", 0)
    assert "ALIGNCTL_CACHE" in refused.value.problems[0].hint


def test_rows_of_a_file_that_was_changed_are_read_again(tmp_path):
    """Though it has the same size and time."""
    for word in ("good", "best"):
        settings = write(tmp_path / "rows.jsonl", pairs(10, word))
        os.utime(tmp_path / "rows.jsonl", (0, 0))
        rows, _ = read_split(settings, "preferences", 0)
        assert rows.dataset[0]["chosen"].startswith(word)


def test_nobody_else_can_look_at_rows(tmp_path):
    """Not even into a folder of an earlier version."""
    (tmp_path / "cache" / "rows").mkdir(parents=True, mode=0o755)
    file = tmp_path / "rows.jsonl"
    settings = write(file, pairs(10))
    file.chmod(0o600)
    read_split(settings, "preferences", 0)
    assert (tmp_path / "cache" / "rows").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_had_begun_is_made_by_one_that_waits(tmp_path):
    begun = tmp_path / "begun"

    def die(folder):
        (folder / "half").write_text("of it")
        begun.touch()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = FORK.Process(target=kept, args=(["it"], die, "it"))
    killed.start()
    while not begun.exists():
        time.sleep(0.01)
    folder = kept(["it"], lambda folder: (folder / "whole").write_text("of it"), "it")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in folder.iterdir()) == ["made_of.json", "whole"]
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_what_failed_is_not_kept(tmp_path):
    def fail(folder):
        (folder / "half").write_text("of it")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept(["it"], fail, "it")
    assert [file.suffix for file in (tmp_path / "cache" / "rows").iterdir()] == [".lock"]
