"""What a result came from: command, code, versions, machine. Torch-free."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import alignctl
from alignctl.config.secrets import mask_override

PACKAGES = (
    "torch transformers trl peft accelerate datasets tokenizers safetensors numpy hydra-core omegaconf deepspeed "
    "bitsandbytes vllm"
).split()


def collect_provenance(command: Sequence[str]) -> dict[str, Any]:
    """Facts about this moment that a reader of the result would need to repeat it; secrets masked."""
    return {
        "command": [mask_override(argument) for argument in command],
        "alignctl": alignctl.__version__,
        "git": _git_commit(Path(alignctl.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "host": platform.node(),
        "executable": sys.executable,
        "folder": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """Commit of the checkout this code runs from, `+changes` when it differs; None outside a checkout of alignctl."""
    if not (folder.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder.parent, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "HEAD") or "no commit") + ("+changes" if git("status", "--porcelain") else "")
