"""Asks a process of our own, which has no GPU and writes its answer to a file (alone/, beforehand/). Torch-free."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignctl.errors import AlignctlError, Problem, RequestError
from alignctl.launch.environment import own_environment
from alignctl.monitor.stopping import handled
from alignctl.run.files import read_json
from alignctl.run.process import PARENT

_POLL_S = 0.2
_SAID = 400  # characters


class ChildFailed(Exception):
    """The process ended without an answer; the message is all that it said."""

    @property
    def last_line(self) -> str:
        """The end of that."""
        return str(self).splitlines()[-1][-_SAID:]


def ask(
    module: str,
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What `python -m MODULE FILE ARGUMENTS...` wrote to FILE.

    Args:
        folder: Where its answer and what it says are written.
        environment: Of the process, beside ours.
        look: Is called again and again meanwhile.

    Raises:
        ChildFailed: It wrote nothing.
        KeyboardInterrupt: A stop was requested, and ended it at once.
    """
    file, log = folder / "answer.json", folder / "log"
    command = [sys.executable, "-P", "-m", module, str(file), *arguments]
    own = {PARENT: str(os.getpid()), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environ = own_environment(os.environ, in_job=False) | environment | own
    with _interrupted():
        with log.open("wb") as output:
            child = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while child.poll() is None:
                look()
                time.sleep(_POLL_S)
        finally:
            child.kill()
            child.wait()
    answer = read_json(file)
    if answer is None:
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        raise ChildFailed(said or f"it ended with code {child.returncode}")
    return answer


def as_error(problems: Sequence[Mapping[str, Any]]) -> AlignctlError:
    """What to raise of the problems in an answer (`AlignctlError.told`)."""
    kind = RequestError if all(one["exit_code"] == RequestError.exit_code for one in problems) else AlignctlError
    error = kind(problems[0]["message"], problems[0]["hint"])
    error.problems = tuple(Problem(one["message"], one["hint"]) for one in problems)
    return error


@contextmanager
def _interrupted() -> Iterator[None]:
    """Requests to stop end it at once: there is nothing to save."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with handled(stop):
        yield
