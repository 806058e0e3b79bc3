"""Writes files whose sizes and hashes are known once they are written, without reading them again. Torch-free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from alignctl.run.fingerprint import file_digest
from alignctl.run.owner import plain

_CHUNK = 2**24


class HashedFile:
    """A file that is written from its beginning to its end, as libraries want one."""

    def __init__(self, path: Path):
        # Not buffered by Python: a thread that holds a buffer as the process ends would bring it down.
        self._file = FileIO(path, "wb", opener=plain)
        self._digest, self._bytes = hashlib.sha256(), 0
        self.failed: OSError | None = None
        """The system's error; libraries in other languages hide it behind one of their own."""

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        count = len(left)
        try:
            while left:
                done = self._file.write(left[:_CHUNK])
                self._digest.update(left[:done])
                left = left[done:]
        except OSError as error:
            self.failed = error
            raise
        self._bytes += count
        return count

    def flush(self) -> None:
        """There is nothing to do."""

    def close(self, to_disk: bool) -> dict[str, Any]:
        """Size and SHA-256 of what was written, which everyone may read who may read the folder.

        Args:
            to_disk: Whether the file is only left once it is on the disk.
        """
        with self._file as file:
            if to_disk:
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_hashed(path: Path, write: Callable[[HashedFile], None]) -> dict[str, Any]:
    """Writes a file and brings it to disk.

    Args:
        write: Is given the file.

    Returns:
        Its size and SHA-256.

    Raises:
        OSError: It cannot be written, whatever `write` makes of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = HashedFile(path)
    try:
        write(file)
    except Exception as error:
        file.close(to_disk=False)
        raise file.failed or error from None
    return file.close(to_disk=True)


def sync_hashed(path: Path) -> dict[str, Any]:
    """Brings a file to disk that others have written, and reads it for its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
