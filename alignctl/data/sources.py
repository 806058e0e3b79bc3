"""Names of sources of rows: files, Hub ids, built-in worlds. Torch-free; raw.py reads them."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import re
from functools import partial
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from urllib.parse import urlsplit

from alignctl.data.files import (
    FILE_SUFFIXES,
    LIGHT_SUFFIXES,
    BadFile,
    Row,
    errors_told,
    read_placed,
    suffix,
    unpacked,
)
from alignctl.data.trees import gathered, is_message_of_tree

BUILTIN_SOURCES = ("builtin:quickstart",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HELD_OUT = re.compile(r"(test|dev|eval|evaluation|valid|validation|heldout|held_out)([-_.\d].*)?", re.IGNORECASE)
_OF_DATASETS = (
    "dataset_dict.json",
    "dataset_info.json",
    "state.json",
)  # beside the .arrow files that the library `datasets` saves
_ARCHIVES = (".bz2", ".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4")
_PEEK_ROWS = 20
_CHUNK = 2**20  # bytes


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `owner/name` and cannot be meant as a path on this machine."""
    return (
        _HUB_ID.fullmatch(path) is not None
        and suffix(path) not in FILE_SUFFIXES
        and not Path(path).exists()
        and not Path(path).parent.exists()
    )


def is_url(path: str | list[str]) -> bool:
    """Whether a file at an address is meant: `https://...`, `s3://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def check_url(url: str) -> None:
    """Whether what is at an address can be read here.

    Raises:
        BadFile: It is no kind of file, or there is no driver for such addresses.
    """
    parts = urlsplit(url)
    _check_suffix(Path(parts.path))
    if parts.scheme in ("http", "https"):
        if parts.password:
            raise BadFile("the address has a password in it, which would be written into the run's folder")
        return
    from fsspec.registry import known_implementations

    if parts.scheme not in known_implementations:
        raise BadFile(
            f"there is no way to read from `{parts.scheme}://`", "use https://, s3://, gs://, abfs:// or a file"
        )
    package = known_implementations[parts.scheme]["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise BadFile(f"`{parts.scheme}://` needs the package `{package}`", f"pip install {package}")


def is_on_this_machine(path: str | list[str]) -> bool:
    """Whether files are meant, and no world, no address and no data set on the Hub."""
    return not isinstance(path, str) or not (path.startswith("builtin:") or is_url(path) or is_hub_id(path))


def shown(path: str | list[str]) -> str:
    """What people are told of a path, or of several."""
    return path if isinstance(path, str) else ", ".join(path)


def files_of(path: str | list[str]) -> list[Path]:
    """The files that are meant, in the order in which they are read: those of each of several paths; of a folder those
    in it and below it, and of a pattern (`*`, `?`, `[...]`, `**`) those that match, by name.

    Raises:
        BadFile: There are none, or there is no telling which ones are meant.
    """
    if not isinstance(path, str):
        if (url := next(filter(is_url, path), None)) is not None:
            raise BadFile(f"{url} is an address, and stands by itself", "name several as entries of `data.mix`")
        files = [file for one in path for file in files_of(one)]
        if (twice := next((file for file in files if files.count(file) > 1), None)) is not None:
            raise BadFile(f"{twice} is named twice", "to repeat rows: `data.mix_stopping_strategy=all_exhausted`")
        if not files:
            raise BadFile("no file is named")
        return files
    place = Path(path).expanduser()
    if place.is_file():
        _check_suffix(place)
        return [place]
    if place.is_dir():
        return _in_folder(place)
    if not glob.has_magic(path):
        raise BadFile("there is no such file", "a Hub id has the form `owner/name`")
    files = sorted(Path(found) for found in glob.glob(str(place), recursive=True) if Path(found).is_file())
    if not files:
        raise BadFile("no file matches this pattern")
    for file in files:
        _check_suffix(file)
    return files


def files_by_key(key: str, path: str | list[str] | None) -> dict[str, str]:
    """A path by the key that names it; files by that and their number, where it names several."""
    if not path:
        return {}
    try:
        files = files_of(path) if is_on_this_machine(path) else []
    except BadFile:
        files = []
    if len(files) > 1:
        return {f"{key}.{number}": str(file) for number, file in enumerate(files)}
    return {key: str(files[0]) if files else shown(path)}


def _check_suffix(file: Path) -> None:
    if suffix(file) not in FILE_SUFFIXES:
        packed = "unpack it, or pack it as .gz, .xz or .zst; " if file.suffix.lower() in _ARCHIVES else ""
        raise BadFile(f"cannot read `{file.suffix or file.name}`", f"{packed}use {', '.join(FILE_SUFFIXES)}")


def _in_folder(folder: Path) -> list[Path]:
    """The files of rows in a folder: of one kind, and not those to train on beside those to hold out."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and suffix(file) in FILE_SUFFIXES]
    hidden = [file for file in found if any(part.startswith(".") for part in file.relative_to(folder).parts)]
    saved = any(file.name in _OF_DATASETS for file in found)
    files = [file for file in found if file not in hidden and not (saved and file.name in _OF_DATASETS)]
    if not files:
        raise BadFile("there is no file of rows in this folder", f"rows are in files {', '.join(FILE_SUFFIXES)}")
    kinds = sorted({suffix(file) for file in files})
    if len(kinds) > 1:
        raise BadFile(f"the folder has files of several kinds: {', '.join(kinds)}", f"name one: `{folder}/*{kinds[0]}`")
    parts = {file: file.relative_to(folder).parts for file in files}
    held_out = [file for file in files if any(map(_HELD_OUT.fullmatch, parts[file]))]
    if held_out and len(held_out) < len(files):
        one, other = (
            Path(*parts[file]) for file in (held_out[0], next(file for file in files if file not in held_out))
        )
        raise BadFile(
            f"the folder has {one} beside {other}: are both to be read?",
            f"name those that are: `{_pattern([file for file in files if file not in held_out], held_out)}`",
        )
    return files


def _pattern(files: list[Path], others: list[Path]) -> str:
    """What names some files of a folder and none of others: a pattern of those beside the first, or the first."""
    folder, first = files[0].parent, files[0]
    beside = [file for file in files if file.parent == folder]
    same = commonprefix([file.name for file in beside]).rstrip("0123456789")
    pattern = folder / f"{same}*{''.join(first.suffixes)}"
    named = set(folder.glob(pattern.name))
    return str(pattern if len(beside) > 1 and named == set(beside) and not named & set(others) else first)


def digest(*files: Path) -> str:
    """SHA-256 of what a file holds; of several, of theirs."""
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def same_content(file: Path, other: Path) -> bool:
    """Whether two files of the same kind hold the same, whichever of them is compressed; those of .zst are compared as
    they are, for it takes a library to unpack them.

    Raises:
        BadFile: One cannot be read.
    """
    if suffix(file) != suffix(other):
        return False
    if file.suffix == other.suffix == suffix(file) and file.stat().st_size != other.stat().st_size:
        return False
    opens = partial(Path.open, mode="rb") if ".zst" in (file.suffix, other.suffix) else unpacked
    with errors_told(), opens(file) as one, opens(other) as another:
        while (chunk := one.read(_CHUNK)) == another.read(_CHUNK):
            if not chunk:
                return True
    return False


def peek_rows(file: Path) -> list[Row]:
    """The first rows of a file; none where that takes a library.

    Raises:
        ValueError: The file has no rows or is not what its name says.
    """
    if suffix(file) not in LIGHT_SUFFIXES or file.suffix == ".zst":
        return []
    rows = list(islice(read_placed(file), _PEEK_ROWS))
    if not rows:
        raise BadFile("the file has no rows")
    return [row for _, row in (gathered(rows) if is_message_of_tree(rows[0][1]) else rows)]
