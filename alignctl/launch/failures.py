"""What to tell people when a stage did not end well: which process it was, where, when, and why. Torch-free."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from alignctl.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LAUNCH,
    EXIT_REQUEST,
    EXIT_STOPPED,
    AlignctlError,
    Interrupted,
    LaunchError,
    Problem,
    RequestError,
    Stopped,
)
from alignctl.launch.watching import Workers
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.paths import StagePaths

_LOG_TAIL = 25  # lines, or all of the last traceback
_FRAMES = 12
_WAITS = "torch/distributed/"  # in the stack of a process that waits for others
_AGAIN = "run the same command again to continue"
_KINDS: dict[int, type[AlignctlError]] = {EXIT_REQUEST: RequestError, EXIT_LAUNCH: LaunchError}


def ended(code: int, workers: Workers, asked: bool, paths: StagePaths) -> int:
    """With what exit code of the command's a stage ended.

    Args:
        code: Exit code of the process that was started, below 0 where a signal ended it.
        asked: Whether a stop was requested.
    """
    if code == EXIT_DONE:
        return code
    if workers.killed() and not asked:
        return EXIT_FAILED
    if error := workers.first_error():
        return int(error["exit_code"])
    if asked:  # ended before it could say so
        return EXIT_STOPPED if newest_checkpoint(paths.checkpoints) else EXIT_INTERRUPTED
    return code


def failure(name: str, code: int, workers: Workers, paths: StagePaths, log: Path, by_us: bool = False) -> AlignctlError:
    """What to raise for a stage that did not end well.

    Args:
        code: What `ended` says.
        log: What the process that was started printed.
        by_us: Whether that one was killed by whoever started it.
    """
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        return stopped(name, code, paths)
    if killed := workers.killed():
        rank, number = killed
        beat = next((beat for beat in workers.beats() if beat["rank"] == rank), {"rank": rank})
        place = _place(beat)
        return AlignctlError(f"stage `{name}`: {place} was killed by signal {number}{_meaning(number)}", _AGAIN)
    if error := workers.first_error():
        return _told(name, error, paths)
    tail = _end_of(log)
    if by_us:
        how = "was ended here, because processes of it had failed and those on this machine did not end by themselves"
    else:
        how = f"was killed by signal {-code}{_meaning(-code)}" if code < 0 else f"failed with exit code {code}"
    return AlignctlError(f"stage `{name}` {how}; the end of {log}:\n\n{tail}\n", _AGAIN if code < 0 else None)


def stopped(name: str, code: int, paths: StagePaths) -> Stopped | Interrupted:
    """What to raise for a stage that ended on request."""
    if code == EXIT_INTERRUPTED:
        return Interrupted(f"stage `{name}`, before it had anything to save", _AGAIN)
    checkpoint = newest_checkpoint(paths.checkpoints)
    return Stopped(f"stage `{name}`, step {checkpoint.step if checkpoint else 0} is saved", _AGAIN)


def stuck(name: str, workers: Workers, asked: list[int], paths: StagePaths) -> AlignctlError:
    """What to raise for a stage in which nothing moved any more, with where the process that is to blame was.

    That is one that did not even answer; else one that does not wait for the others, by the stacks the processes wrote
    to their logs; else the one that has not got on for longest.

    Args:
        asked: Process ids of those on this machine, which were asked where they are.
    """
    beats = workers.beats()
    stacks = {beat["rank"]: _stack(_log(paths, beat["rank"])) for beat in beats}
    silent = [beat for beat in beats if beat["pid"] in asked and not stacks[beat["rank"]]]
    busy = [beat for beat in beats if stacks[beat["rank"]] and _WAITS not in stacks[beat["rank"]]]
    blamed = max(silent or busy or beats, key=lambda beat: workers.still_s(beat["rank"]))
    where = stacks[blamed["rank"]]
    return AlignctlError(
        f"stage `{name}`: {_place(blamed)} did not get on for {workers.still_s(blamed['rank']):,.0f} s "
        f"({_progress(blamed)}), so the stage was ended; "
        + (f"it was in\n\n{where}\n" if where else "it did not answer where it was, as if it was stopped"),
        f"{_AGAIN}; `launcher.stall_timeout` is how long that may last. All logs: {paths.logs(paths.last_attempt())}",
    )


def _progress(beat: dict[str, Any]) -> str:
    """What a process was doing, and how far it was."""
    return ", ".join([beat["doing"], *(f"{done:,} {what}" for what, done in beat["counts"].items())])


def not_begun(name: str, timeout_s: float, log: Path) -> AlignctlError:
    """What to raise for a stage none of whose processes has said anything."""
    return AlignctlError(
        f"stage `{name}`: none of its processes has begun within {timeout_s:,} s; the end of {log}:\n\n{_end_of(log)}"
        "\n",
        f"{_AGAIN}; `launcher.stall_timeout` is how long it may take. A file system that does not answer keeps Python "
        "from importing",
    )


def _stack(log: Path) -> str:
    """Where the main thread of a process was when it was asked, innermost first; faulthandler wrote it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    asked = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    frames = lines[asked[-1] + 1 :] if asked else []
    end = next((number for number, line in enumerate(frames) if not line.startswith("  File ")), len(frames))
    return "\n".join(frames[: min(end, _FRAMES)])


def _told(name: str, error: dict[str, Any], paths: StagePaths) -> AlignctlError:
    """An error as the process that had it told it."""
    if "traceback" in error:
        log = _log(paths, error["rank"])
        return AlignctlError(f"stage `{name}`: {_place(error)} failed; from {log}:\n\n{error['traceback'].rstrip()}\n")
    first, *others = (Problem(**problem) for problem in error["problems"])
    told = _KINDS.get(error["exit_code"], AlignctlError)(f"stage `{name}`: {first.message}", first.hint)
    told.problems += tuple(others)
    return told


def _log(paths: StagePaths, rank: int) -> Path:
    return paths.rank_log(paths.last_attempt(), rank)


def _place(facts: dict[str, Any]) -> str:
    """Which process, where, and after which step."""
    host = f" on {facts['host']}" if "host" in facts else ""
    step = f" after step {facts['step']}" if facts.get("step") is not None else ""
    return f"rank {facts['rank']}{host}{step}"


def _meaning(number: int) -> str:
    return " (out of memory, if nobody sent it)" if number == signal.SIGKILL else ""


def _end_of(log: Path) -> str:
    """The last traceback of a log, else its last lines."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(there is no log)"
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback (")), default=len(lines))
    return "\n".join(lines[min(start, max(len(lines) - _LOG_TAIL, 0)) :])
