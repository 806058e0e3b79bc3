"""Where what runs share is kept. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from alignctl.errors import RequestError

PARTS = {
    "rows": "rows as they were read, held out and tokenised",
    "reference_logps": "log-probabilities of references",
    "inductor": "compiled passes",
    "chat": "answers of models that judge",
}
"""Folders of the cache, and what is in each."""


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
