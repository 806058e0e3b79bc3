"""Errors meant for people, and the exit codes of the command. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
"""The run failed."""
EXIT_REQUEST = 2
"""The request was wrong: found before training."""
EXIT_LAUNCH = 3
"""Launch or submit was refused."""
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint saved; the same command continues."""
EXIT_INTERRUPTED = 130
"""Stopped on request without a checkpoint."""
_SAID = 400  # characters of what a library says
_NAMED = 3  # of things that a message lists


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what and where, and what to type instead."""

    message: str
    hint: str | None = None
    unusable: str | None = None
    """The key whose value is of no use to checks that look further."""


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """The first of several things for a message, and how many more there are."""
    more = f" and {len(items) - _NAMED:,} more" if len(items) > _NAMED else ""
    return separator.join(items[:_NAMED]) + more


class AlignctlError(Exception):
    """An error a user can act on: shown without a traceback. `exit_code` is the command's exit code."""

    exit_code = EXIT_FAILED
    word = "error"
    """Begins the message."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, hint),)

    def __str__(self) -> str:
        """All problems, each with its hint on a line of its own."""
        lines = []
        for problem in self.problems:
            lines.append(f"{self.word}: {problem.message}")
            if problem.hint:
                lines.append(f"hint: {problem.hint}")
        return "\n".join(lines)

    def told(self) -> list[dict[str, Any]]:
        """The problems as JSON takes them, for another process to raise."""
        return [asdict(problem) | {"exit_code": self.exit_code} for problem in self.problems]


class NotANumber(AlignctlError):
    """A model or a reward gives NaN or infinity, so that there is nothing to go on with."""


class RequestError(AlignctlError):
    """The request cannot be carried out as written."""

    exit_code = EXIT_REQUEST

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> RequestError:
        """Reports several problems together."""
        error = cls(problems[0].message, problems[0].hint)
        error.problems = tuple(problems)
        return error


class LaunchError(AlignctlError):
    """The machine or the scheduler refused to start the run."""

    exit_code = EXIT_LAUNCH


@contextmanager
def refused(what: str, hint: str | None = None) -> Iterator[None]:
    """Tells people what a library does not take of their settings, in the library's words. What alignctl's own code
    raises is left as it is: a bug.

    Args:
        what: What was given to it: "the settings of `sft`".

    Raises:
        RequestError: It does not take them.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError, ArithmeticError) as error:
        if raised_in(error).startswith("alignctl."):
            raise
        said = " ".join(str(error).split())
        raise RequestError(
            f"{what} cannot be used: {said[:_SAID]}{'...' if len(said) > _SAID else ''}", hint
        ) from error


def raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace else ""


class Stopped(AlignctlError):
    """The run was stopped on request; a checkpoint is saved."""

    exit_code = EXIT_STOPPED
    word = "stopped"


class Interrupted(AlignctlError):
    """The run was stopped on request before it had anything to save."""

    exit_code = EXIT_INTERRUPTED
    word = "interrupted"
