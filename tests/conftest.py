"""Shared by all tests: the command run as a user runs it, and where the real data is."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.daily import of_today
from support.processes import HANG_S

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ALIGNCTL_SHARED", ROOT.parent / "shared")).resolve()


# Folders whose tests all train something: their imports alone take longer than the fast tests may.
HEAVY = ("alone", "beforehand", "engine", "evaluate", "models", "stage", "trainers")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves those folders alone where their tests would be deselected anyway."""
    heavy = collection_path.parent == ROOT / "tests" and collection_path.name in HEAVY
    return True if heavy and "not train" in config.option.markexpr else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of what is spread over several days, that of today. Files with slow tests first, whole runs before all, so that
    no core is left with one of them at the end."""
    others = _of_other_days(items)
    if others and not _named(config):
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent != ROOT / "tests" / "whole"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: nobody looks through it again, which takes a third of a second each time."""
    gc.collect()
    gc.freeze()


def _of_other_days(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests that are marked as spread and not of today: of each file a part, or files as a whole."""
    parts: dict[tuple[Path, int], list[pytest.Item]] = {}
    files: dict[int, dict[Path, list[pytest.Item]]] = {}
    for item in items:
        if mark := item.get_closest_marker("spread"):
            (days,) = mark.args
            if mark.kwargs.get("by_file"):
                files.setdefault(days, {}).setdefault(item.path, []).append(item)
            else:
                parts.setdefault((item.path, days), []).append(item)
    of_parts = {item for (_, days), some in parts.items() for item in set(some) - set(of_today(some, days))}
    of_files = {
        item
        for days, some in files.items()
        for file in some.keys() - set(of_today(sorted(some), days))
        for item in some[file]
    }
    return of_parts | of_files


def _named(config: pytest.Config) -> bool:
    """Whether somebody wants tests of single files, all of them."""
    return bool(config.option.file_or_dir)


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def alignctl(tmp_path: Path):
    """Runs `alignctl ARGUMENTS` in a process of its own, in an empty folder."""

    def run(*arguments: str, folder: Path = tmp_path, timeout_s: float = HANG_S) -> Done:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "alignctl", *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def free_port():
    """Says a port that no one listens on."""

    def find() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data and a real model."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ALIGNCTL_SHARED")
    return folder


@pytest.fixture
def small(tmp_path: Path):
    """Small trainers in this process."""
    from support.small import Small  # imports torch

    return Small(tmp_path)
