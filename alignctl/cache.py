"""Where what runs share is kept, what lies there, and how it is removed. Torch-free, and light."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alignctl.errors import RequestError

PARTS = {
    "rows": "rows as they were read, held out and tokenised",
    "reference_logps": "log-probabilities of references",
    "inductor": "compiled passes",
    "chat": "answers of models that judge",
}
"""Folders of the cache, and what is in each."""

LOCK = ".lock"
"""Ends the name of the file that is locked while what is named like it is made."""

_MADE_OF = "made_of.json"
_LOOK_EVERY_S = 0.1


def cache_dir() -> Path:
    """What runs share and may be removed at any time: ALIGNCTL_CACHE, else alignctl/ in the user's cache folder."""
    given = os.environ.get("ALIGNCTL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given).expanduser() if given else home / "alignctl"


def private_dir(part: str) -> Path:
    """A folder of the cache that nobody else can look into, whatever the files in it allow: rows may be private.

    Raises:
        RequestError: It cannot be made, or is somebody else's.
    """
    folder = cache_dir() / part
    hint = "name a folder of your own with the environment variable ALIGNCTL_CACHE"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RequestError(f"the cache {folder} cannot be made: {error.strerror}", hint) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"the cache {folder} cannot be written to: it may be somebody else's", hint)
    if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: a file or a folder, found again by its name."""

    part: str
    path: Path
    bytes: int
    used: float
    """When it was made or taken last, in seconds since 1970."""
    made_of: str | None
    """The source of rows that it was made of, where that is known."""


def entries(part: str) -> list[Entry]:
    """What lies in a folder of the cache, that included which was never finished."""
    folder = cache_dir() / part
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix != LOCK:
            with suppress(FileNotFoundError):  # somebody else removed it just now
                stats = [file.stat() for file in (path, *path.rglob("*"))]
                size, used = sum(one.st_size for one in stats), max(one.st_mtime for one in stats)
                found.append(Entry(part, path, size, used, source_of(path)))
    return found


def remove(entry: Entry) -> bool:
    """Removes what is kept; whether it could, for what is being made is left to whoever makes it. What a process has
    open stays readable to it on a disk of its own machine."""
    name = entry.path.name.split(".")[1] if entry.path.name.startswith(".") else entry.path.name
    lock = entry.path.with_name(f"{name}{LOCK}")
    with alone(lock, waits=False) as free:
        if not free:
            return False
        if entry.path.is_dir():
            gone = entry.path.with_name(f".{name}.removed.{os.getpid()}")
            entry.path.rename(gone)  # a folder that has its name is whole
            shutil.rmtree(gone, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    return True


def note_source(folder: Path, source: str) -> None:
    """Writes down of which rows something is made: a file, a Hub id, or another folder of the cache."""
    (folder / _MADE_OF).write_text(json.dumps(source), encoding="utf-8")


def note_use(path: Path) -> None:
    """Writes down that something was taken, by the time of its last change."""
    with suppress(OSError):  # it is there to be read, which is what matters
        os.utime(path)


def source_of(path: Path) -> str | None:
    """The rows that an entry is made of, through those that it was made of in between."""
    with suppress(OSError, ValueError):
        source = json.loads((path / _MADE_OF).read_text(encoding="utf-8"))
        above = path.parent / source
        return source_of(above) if source and "/" not in source and above.is_dir() else source or None
    return None


@contextmanager
def alone(lock: Path, waits: bool = True) -> Iterator[bool]:
    """Lets one process in at a time; all at once where the file system has no locks. The system lets the next one in
    when a process ends, however it ends.

    Args:
        lock: A file, which nobody else removes than who is in. Another may have done so after it was opened here, and
            what is locked then is of no use: those who come later lock a new one.
        waits: Until nobody else is in.

    Yields:
        Whether it is in, which it is in the end if it waits.
    """
    while True:
        with lock.open("w") as file:
            is_in = not _is_locked(file)
            if is_in and not _has_name(file, lock):
                continue
            if is_in or not waits:
                yield is_in
                return
        time.sleep(_LOOK_EVERY_S)


def _has_name(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_locked(file: IO[Any]) -> bool:
    """Whether somebody else holds the lock of a file; if not, it is ours until the file is closed. Where the file
    system has no locks nobody holds one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
