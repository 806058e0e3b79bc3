"""Where what runs share is kept. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """What runs share and may be removed at any time: ALIGNCTL_CACHE, else alignctl/ in the user's cache folder."""
    given = os.environ.get("ALIGNCTL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given).expanduser() if given else home / "alignctl"
