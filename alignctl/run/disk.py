"""Whether there is room to write: asked beforehand, and found out where a write failed. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of system errors that say there is no room: on the disk, for this user, for one file."""

_PROBE = b"\0" * 2**20
_TRIAL, _TRIAL_S = 2**28, 3.0  # bytes, and seconds after which it is enough


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the file system of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def seconds_to_write(count: int, folder: Path) -> float:
    """How long so many bytes take to be written into an existing folder, synced, and hashed, by a trial."""
    trial = folder / ".trial"
    began = time.monotonic()
    try:
        with trial.open("wb") as file:
            block = os.urandom(2**24)
            while file.tell() < min(count, _TRIAL) and time.monotonic() - began < _TRIAL_S:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
        with trial.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        return (time.monotonic() - began) * count / max(trial.stat().st_size, 1)
    finally:
        trial.unlink(missing_ok=True)


def lack_of_room(error: BaseException, staging: Path) -> str | None:
    """The system's words for a write that failed for lack of room; None where an error has another reason.

    Libraries in other languages hide the system's error. safetensors and tokenizers name its number in their message.
    torch does not: there a write tells, to a file that is as long as the largest one in `staging`. None of those is
    touched: they may be whole, and noted as they are.
    """
    link: BaseException | None = error
    while link is not None:
        named = re.search(r"\(os error (\d+)\)", str(link))
        number = link.errno if isinstance(link, OSError) else int(named[1]) if named else None
        if number in FULL:
            return os.strerror(number)
        link = link.__cause__ or link.__context__
    sizes = [file.stat().st_size for file in staging.rglob("*") if file.is_file()]
    if not sizes:
        return None
    try:
        with tempfile.TemporaryFile(dir=staging) as file:
            os.pwrite(file.fileno(), _PROBE, max(sizes))
            os.fsync(file.fileno())
    except OSError as refused:
        return os.strerror(refused.errno) if refused.errno in FULL else None
    return None


def shown_bytes(count: int) -> str:
    """A number of bytes for people: `1.5 GB`, in powers of 1000."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(max(len(str(count)) - 1, 0) // 3, len(units) - 1)
    return f"{count:,} bytes" if power == 0 else f"{count / 1000**power:,.1f} {units[power]}"
