"""Reward functions in processes of their own, which may take only so long. Torch-free.

A process begins anew, with the modules that Python finds here, and loads its function itself: nothing of what trains is
in it, no lock is copied in the middle of something, and what the function loads is there once. What it prints comes out
here.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import ModuleType
from typing import Any

from alignctl.errors import AlignctlError, RequestError
from alignctl.run.process import PARENT, die_with_parent

_END_S = 1.0  # that a process is given to be gone
_SERVE = """
import sys; sys.path[:] = {path!r}
from alignctl.config.secrets import masked_output
from alignctl.rollout.functions import serve
with masked_output():
    serve(*{given!r})
"""


class FunctionFailed(AlignctlError):
    """A function did not score what it was given."""

    def __init__(self, message: str, member: int | None):
        """`member` is the first that it does not score by itself, by its place, if there is one."""
        super().__init__(message)
        self.message, self.member = message, member


class ProcessFunction:
    """A reward function: called as itself, it runs in processes, each of which is given a part."""

    def __init__(self, target: str, processes: int = 1, timeout_s: float = 300.0, **settings: Any):
        """Starts the processes.

        Args:
            target: `module:name` or `file.py:name`.
            timeout_s: That it may take to be loaded, and then for what it is asked at a time.
            settings: Further arguments, the same in all calls.

        Raises:
            RequestError: There is no such function, or it cannot be loaded.
        """
        self._target, self._settings, self._timeout_s = target, settings, timeout_s
        self._processes = [_Process(target, settings) for _ in range(processes)]
        for process in self._processes:
            process.load(timeout_s)
        parameters = self._processes[0].parameters
        self.__signature__ = inspect.Signature([one for one in parameters if one.name not in settings])

    def __call__(self, groups: Sequence[Sequence[int]] = (), /, **given: list[Any]) -> list[float | None]:
        """A number for each completion, or none.

        Args:
            groups: Places of the completions that are scored together; one group of all where there are none.

        Raises:
            FunctionFailed: It raised something, did not return in time, ended its process, or gave other things.
        """
        count = len(next(iter(given.values()))) if given else 0
        parts = _divided(groups or [range(count)], len(self._processes))
        until = time.monotonic() + self._timeout_s
        asked = list(zip(self._processes, parts, strict=False))
        for process, part in asked:
            process.ask(_chosen(given, part))
        found: list[float | None] = [None] * count
        for process, part in asked:
            kind, said = process.answer(until)
            if kind != "scores":
                raise self._failed(_WORDS[kind].format(said, limit=self._timeout_s), given, part)
            if len(said) != len(part):
                raise FunctionFailed(f"gave {len(said)} numbers for {len(part)} completions", None)
            for member, score in zip(part, said, strict=True):
                found[member] = score
        return found

    def _failed(self, message: str, given: Mapping[str, list[Any]], part: Sequence[int]) -> FunctionFailed:
        """Looks for the completion that it fails at, one by one, for as long as all of them might have taken; the last
        that is looked at may take as long by itself."""
        for process in self._processes:
            process.end()
        alone, until = _Process(self._target, self._settings), time.monotonic() + self._timeout_s
        try:
            alone.load(self._timeout_s)
            for member in part:
                if time.monotonic() > until:
                    break
                alone.ask(_chosen(given, [member]))
                if alone.answer(time.monotonic() + self._timeout_s)[0] != "scores":
                    return FunctionFailed(message, member)
        finally:
            alone.end()
        return FunctionFailed(message, None)


_WORDS = {
    "raised": "raised {0}",
    "late": "did not return within {limit:g} s",
    "gone": "ended its process, with code {0}",
    "other": "gave what is no number: {0}",
}


class _Process:
    """One process of a function, from here."""

    def __init__(self, target: str, settings: Mapping[str, Any]):
        self._target = target
        self._connection, theirs = Pipe()
        with theirs:
            code = _SERVE.format(path=[str(Path(one or ".").resolve()) for one in sys.path], given=(
                theirs.fileno(), target, dict(settings)
            ))  # fmt: skip
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {PARENT: str(os.getpid())},
                process_group=0,  # what the function starts ends with it
            )
        self.end = weakref.finalize(self, _end, self._process, self._connection)
        self.parameters: list[inspect.Parameter] = []

    def load(self, timeout_s: float) -> None:
        """Waits until it has its function.

        Raises:
            RequestError: It does not get it.
        """
        kind, said = self.answer(time.monotonic() + timeout_s)
        if kind == "missing":
            raise RequestError(f"there is no reward function `{self._target}`: {said}", "write `module:function`")
        if kind != "loaded":
            raise RequestError(
                f"the reward function `{self._target}` cannot be loaded: its module "
                + _WORDS[kind].format(said, limit=timeout_s)
            )
        self.parameters = [
            inspect.Parameter(
                name, getattr(inspect.Parameter, kind), default=None if optional else inspect.Parameter.empty
            )
            for name, kind, optional in said
        ]

    def ask(self, given: Mapping[str, Any]) -> None:
        try:
            self._connection.send(given)
        except OSError:  # it is gone, which its answer tells
            return

    def answer(self, until: float) -> tuple[str, Any]:
        """What it says, and of which kind that is."""
        try:
            if not self._connection.poll(max(until - time.monotonic(), 0.0)):
                self._process.send_signal(signal.SIGUSR2)  # it says where it is
                self.end()
                return "late", None
            return self._connection.recv()
        except (EOFError, OSError):
            self.end()
            return "gone", self._process.returncode


def _end(process: subprocess.Popen, connection: Connection) -> None:
    """At the end of the connection it ends by itself, if it is not busy; what it started is ended with it."""
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _chosen(given: Mapping[str, list[Any]], members: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [values[member] for member in members] for name, values in given.items()}


def _divided(groups: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Groups dealt out to parts, as many to each, with neighbours together; no part is empty."""
    parts = min(parts, len(groups))
    bounds = [len(groups) * number // parts for number in range(parts + 1)]
    return [
        [member for group in groups[first:last] for member in group]
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]


# In the process


class NoFunction(Exception):
    """There is no function where one is named."""


def serve(descriptor: int, target: str, settings: Mapping[str, Any]) -> None:
    """Loads a function and answers with its scores until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # whoever asks decides when it ends
        signal.signal(number, lambda *_: None)  # ignored, they would be by what the function starts, too
        os.register_at_fork(after_in_child=partial(signal.signal, number, signal.SIG_DFL))
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    die_with_parent()
    with Connection(descriptor) as connection:
        if (function := _loaded(target, connection)) is None:
            return
        while True:
            try:
                given = connection.recv()
            except EOFError:
                return
            connection.send(_scores(function, given | settings))


def _loaded(target: str, connection: Connection) -> Callable[..., Any] | None:
    try:
        function = find_function(target)
        parameters = inspect.signature(function).parameters.values()
    except NoFunction as error:
        connection.send(("missing", str(error)))
    except Exception as error:  # whatever a user's module raises: this process is there to tell it
        traceback.print_exc()
        connection.send(("raised", _said(error)))
    else:
        connection.send(("loaded", [(one.name, one.kind.name, one.default is not one.empty) for one in parameters]))
        return function
    return None


def find_function(target: str) -> Callable[..., Any]:
    """The function that `module:name` or `file.py:name` says.

    Raises:
        NoFunction: There is none. Whatever else is raised is the module's.
    """
    place, _, name = target.rpartition(":")
    module = _of_file(place) if place.endswith(".py") else _of_name(place)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise NoFunction(str(error)) from error


def _of_name(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):  # itself, or what it would be in
            raise NoFunction(str(error)) from error
        raise


def _of_file(place: str) -> ModuleType:
    if not Path(place).is_file():
        raise NoFunction(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _scores(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[str, Any]:
    try:
        found = list(function(**given))
    except Exception as error:  # likewise
        traceback.print_exc()
        return "raised", _said(error)
    try:
        return "scores", [None if one is None else float(one) for one in found]
    except (TypeError, ValueError) as error:
        return "other", str(error)


def _said(error: Exception) -> str:
    """An error, and the line of the user's that it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}{f': {text}' if text else ''} ({last.filename}, line {last.lineno})"
