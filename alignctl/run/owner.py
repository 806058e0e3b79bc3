"""Whose a run directory is, and what is opened in it: others may have put there what leads elsewhere. Torch-free."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from alignctl.errors import LaunchError

TRUST = "--trust-run-dir"
_NO_FILE = (errno.ELOOP, errno.ENXIO)  # a link; a pipe or a device that nobody serves


def plain(path: str, flags: int) -> int:
    """Opens a file of a run, for `open(..., opener=plain)`: through no link, and nothing but a plain file, which always
    answers. It is for its owner to write.

    Raises:
        LaunchError: It is something else.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _other(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _other(path)
    return descriptor


def _other(path: str) -> LaunchError:
    return LaunchError(
        f"{path} is a link, a pipe or a device, and alignctl would write a file there",
        "look at who put it there, and remove it",
    )


def take_away(path: Path, strict: bool = False) -> None:
    """Removes a folder with all in it, a file, or a link without what it leads to, if there is one.

    Args:
        strict: Whether it is an error that something of a folder cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not strict)
    else:
        path.unlink(missing_ok=True)


def refuse_others(folder: Path, trusted: bool, say: Callable[[str], None]) -> None:
    """Acts on no run directory that others may have written: its settings name code and models.

    Args:
        trusted: Whether the user has said that this one is all right.
        say: Is told of a folder that its group may write, or of which it is not known.

    Raises:
        LaunchError: It is another user's, which is not asked of root, or everybody may write there, as far as its file
            system knows of owners and modes.
    """
    try:
        why = None if trusted else _why_not(folder)
        unknown = why is not None and _by_itself(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LaunchError(f"cannot look at {folder}: {error.strerror}", "give another `run_dir`") from error
    if unknown:
        say(f"the file system gives owner and mode of {folder} by itself, so who may write there is not known")
    elif why:
        raise LaunchError(f"{folder} {why}", f"give another `run_dir`, or `{TRUST}` if you know what is in it")
    elif not trusted and folder.stat().st_mode & stat.S_IWGRP:
        say(f"all of its group may write to {folder}, and so change what is run (`chmod g-w`, or `{TRUST}`)")


def is_others(folder: Path) -> bool:
    """Whether others may have written a run directory, or it cannot be looked at."""
    try:
        return _why_not(folder) is not None and not _by_itself(folder)
    except OSError:
        return True


def _why_not(folder: Path) -> str | None:
    found, user = folder.stat(), os.geteuid()
    if user not in (0, found.st_uid):
        return f"belongs to {_name(found.st_uid)}, not to you"
    return "may be written to by everybody" if found.st_mode & stat.S_IWOTH else None


def _by_itself(folder: Path) -> bool:
    """Whether a file system says of all folders what it says of this one, whoever made them and how, as CIFS, drvfs, a
    bucket that is mounted and NFS with all_squash do: it says so of one that is made in it for us alone."""
    with suppress(OSError), TemporaryDirectory(prefix=".", dir=folder) as own:
        return _why_not(Path(own)) is not None
    return False


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
