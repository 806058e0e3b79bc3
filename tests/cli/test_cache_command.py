"""`alignctl cache list` and `alignctl cache clear`."""

from __future__ import annotations

import fcntl
import json
import os
import time

import pytest

from alignctl import cache
from alignctl.cache import cache_dir, note_source, private_dir

DAY = 86400


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))


def keep(name: str, source: str, days: float = 0, size: int = 1000):
    """Something that is kept, of so many bytes beside what says of what."""
    folder = private_dir("rows") / name
    folder.mkdir()
    (folder / "rows.arrow").write_bytes(bytes(size))
    note_source(folder, source)
    then = time.time() - days * DAY
    for path in (folder / "rows.arrow", folder / "made_of.json", folder):
        os.utime(path, (then, then))
    return folder


def test_lists_kinds_and_of_which_rows(alignctl):
    keep("aa", "/data/pairs.jsonl", size=5000)
    keep("bb", "aa", size=7000)  # token ids of those rows
    keep("cc", "owner/set")
    keep("dd", "gone")
    described = json.loads(alignctl("cache", "list", "--json").out)
    rows = next(kind for kind in described["kinds"] if kind["kind"] == "rows")
    assert {source: one["things"] for source, one in rows["made_of"].items()} == {
        "/data/pairs.jsonl": 2, "gone": 1, "owner/set": 1,
    }  # fmt: skip
    assert rows["made_of"]["/data/pairs.jsonl"]["bytes"] >= 12_000
    assert described["bytes"] >= rows["bytes"] >= 14_000
    shown = alignctl("cache", "list").out
    assert f"{cache_dir()}: " in shown
    assert "of /data/pairs.jsonl" in shown
    assert "log-probabilities of references" in shown


def test_clears_what_is_old_and_says_how_much(alignctl):
    old, new = keep("aa", "a.jsonl", days=31), keep("bb", "b.jsonl", days=29)
    logps = private_dir("reference_logps") / "x.safetensors"
    logps.write_bytes(bytes(10))
    done = alignctl("cache", "clear", "rows", "--older-than", "30d")
    assert done.code == 0
    assert done.out.startswith("removed 1 of 2, ")
    assert (old.exists(), new.exists(), logps.exists()) == (False, True, True)
    assert json.loads(alignctl("cache", "clear", "--json").out)["removed"] == 2
    assert [path for path in cache_dir().rglob("*") if path.is_file()] == []


def test_what_is_being_made_is_left_alone(alignctl):
    keep("aa", "a.jsonl")
    (private_dir("rows") / ".bb.host.1").mkdir()
    with (private_dir("rows") / "bb.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = alignctl("cache", "clear")
    assert "left alone, because they are being made: 1" in done.out
    assert (private_dir("rows") / ".bb.host.1").exists()
    alignctl("cache", "clear")
    assert list(private_dir("rows").iterdir()) == []


def test_a_lock_whose_file_is_removed_before_it_is_asked_for_is_taken_again(tmp_path, monkeypatch):
    """As `cache clear` may at any moment; two would make the same otherwise."""
    lock, is_locked = tmp_path / "aa.lock", cache._is_locked

    def after_it_is_removed(file):
        monkeypatch.undo()
        lock.unlink()
        return is_locked(file)

    monkeypatch.setattr(cache, "_is_locked", after_it_is_removed)
    with cache.alone(lock) as first, cache.alone(lock, waits=False) as second:
        assert (first, second) == (True, False)


def test_kinds_and_ages_that_are_none_are_refused(alignctl):
    done = alignctl("cache", "clear", "row")
    assert (done.code, done.out) == (2, "")
    assert "hint: did you mean `rows`?" in done.err
    assert "`--older-than soon` is no age" in alignctl("cache", "clear", "--older-than", "soon").err
