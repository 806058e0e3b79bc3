"""Files at an address (`https://`, `s3://`, ...), fetched once into the cache and again where they changed. Torch-free.

What the standard library does not know the package `fsspec` does, with a driver of the user's for most stores.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from alignctl.data.files import BadFile
from alignctl.data.kept import kept
from alignctl.errors import AlignctlError, RequestError

_WAIT_S = 60
_CHUNK = 2**16  # bytes: of a slow connection no more than takes seconds
_SAID = 300  # characters of what a library says
_WEB = ("http", "https")


def fetch(url: str, count: Callable[[int], None] = lambda more: None) -> list[Path]:
    """The file at an address, or those that match a pattern, on this machine.

    Args:
        count: Is told of more bytes that came, as it goes.

    Raises:
        AlignctlError: They cannot be had.
    """
    with _refused(url):
        if glob.has_magic(url) and urlsplit(url).scheme not in _WEB:
            import fsspec

            system, pattern = fsspec.core.url_to_fs(url)
            found = [system.unstrip_protocol(name) for name in sorted(system.glob(pattern))]
            if not found:
                raise FileNotFoundError("nothing there matches this pattern")
            return [_fetched(one, count) for one in found]
        return [_fetched(url, count)]


def _fetched(url: str, count: Callable[[int], None]) -> Path:
    name = PurePosixPath(unquote(urlsplit(url).path)).name

    def make(folder: Path) -> None:
        with _opened(url) as there, (folder / name).open("wb") as here:
            for chunk in _chunks(there, count):
                here.write(chunk)

    return kept(["fetched", url, _version(url) or _digest(url, count)], make, url) / name


def _version(url: str) -> str | None:
    """What tells one content at an address from another, without fetching it; None where nothing does."""
    if urlsplit(url).scheme not in _WEB:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        return system.ukey(path)
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_WAIT_S) as answer:
            said = [answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]
    except HTTPError:
        return None  # some servers answer to nothing but GET, which says what is wrong otherwise
    return " ".join(map(str, said)) if said[0] or said[1] else None


def _digest(url: str, count: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with _opened(url) as there:
        for chunk in _chunks(there, count):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(there: BinaryIO, count: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := there.read(_CHUNK):
        count(len(chunk))
        yield chunk


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    if urlsplit(url).scheme not in _WEB:
        import fsspec

        with fsspec.open(url, "rb") as there:
            yield there
        return
    with urlopen(url, timeout=_WAIT_S) as there:
        yield there
        if there.length:  # http.client ends without a word where the other side does
            raise URLError(f"the connection ended {there.length:,} bytes early")


@contextmanager
def _refused(url: str) -> Iterator[None]:
    try:
        yield
    except (AlignctlError, BadFile):
        raise
    except FileNotFoundError as error:
        raise RequestError(f"{url}: there is no such file: {error}") from error
    except HTTPError as error:
        kind = RequestError if error.code in (401, 403, 404, 410) else AlignctlError
        raise kind(f"{url}: cannot be fetched: {error.code} {error.reason}") from error
    except Exception as error:  # drivers raise what they like; each means that the file could not be had
        said = " ".join(re.sub(r"^<urlopen error (.*)>$", r"\1", str(error)).split()) or type(error).__name__
        raise AlignctlError(
            f"{url}: cannot be fetched: {said[:_SAID]}", "is the address right, and is it reachable from here?"
        ) from error
