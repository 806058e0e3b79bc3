"""What may stand in `reward_funcs`. Torch-free, pure.

An entry is text, or a mapping that begins with its kind: `{format: '...'}`. The first field of each class here has the
name of the kind, and is what a plain text means where that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class FunctionEntry:
    """A function of the user's."""

    function: str
    """`module:function` or `file.py:function`."""
    name: str | None = None
    """What its scores are logged as; None takes the function's own, as in all of these what it is."""

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True)
class ServerEntry:
    """A server that is given completions and answers with a number for each."""

    url: str
    """Where it is asked, `http://...` or `https://...`."""
    key_from: str | None = None
    """Variable of the environment with a key, which is sent as a bearer token."""
    name: str | None = None
    """What its scores are logged as; None takes the last part of the path, or the host."""

    @property
    def label(self) -> str:
        url = urlsplit(self.url)
        return self.name or url.path.rstrip("/").rpartition("/")[2] or url.hostname or self.url


@dataclass(frozen=True)
class JudgeEntry:
    """A language model behind a chat endpoint as OpenAI has it, asked for a grade of each completion."""

    judge: str
    """Where it is, without `/chat/completions`: `http://localhost:8000/v1`."""
    model: str
    """Its name there."""
    question: str = (
        "[Question]\n{prompt}\n\n[Answer]\n{completion}\n\n"
        "How well does the answer serve who asked? Judge it from 0 (not at all) to 10 (it could not be better), and "
        "end with a line `Score: N`."
    )
    """What it is asked, with `{prompt}`, `{completion}` and the names of columns in braces. The number after the last
    `Score:` of its answer is the score; where there is none the completion has no score."""
    temperature: float = 0.0
    """Of its answers."""
    max_tokens: int = 512
    """Of an answer."""
    parallel: int = 8
    """Questions that each process asks at a time."""
    key_from: str | None = None
    """Variable of the environment with a key, which is sent as a bearer token."""
    name: str | None = None
    """What its scores are logged as; None is `judge`."""

    @property
    def label(self) -> str:
        return self.name or "judge"


@dataclass(frozen=True)
class Ready:
    """A function that alignctl has, by its name."""

    @property
    def label(self) -> str:
        return self.name or fields(self)[0].name

    @property
    def columns(self) -> dict[str, str]:
        """Which column of the rows an argument of the function is."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """Other arguments of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:] if field.name != "name"}


@dataclass(frozen=True)
class ToAnswer(Ready):
    """One that compares with what is right."""

    @property
    def columns(self) -> dict[str, str]:
        return {"answer": getattr(self, fields(self)[0].name)}


@dataclass(frozen=True)
class ExactMatch(ToAnswer):
    """1 where the completion is the answer, up to white space at its ends; else 0."""

    exact_match: str = "answer"
    """Column of the rows with what is right."""
    after: str | None = None
    """Only what follows the last of these texts is compared, in both: `'####'`."""
    name: str | None = None


@dataclass(frozen=True)
class Numeric(ToAnswer):
    """1 where the last number of the completion is that of the answer; else 0."""

    numeric: str = "answer"
    """Column of the rows with what is right, a number or a text that ends with one."""
    tolerance: float = 1e-6
    """How far it may be off, as a share of the right number."""
    name: str | None = None


@dataclass(frozen=True)
class BoxedMath(ToAnswer):
    r"""1 where the formula in the last `\boxed{}` of the completion is equal to the answer; else 0."""

    boxed_math: str = "answer"
    """Column of the rows with what is right, in LaTeX."""
    name: str | None = None


@dataclass(frozen=True)
class Format(Ready):
    """1 where the completion is of a form; else 0."""

    format: str
    """Regular expression that the whole completion matches; `.` is a line break, too."""
    name: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"pattern": self.format}


@dataclass(frozen=True)
class LengthPenalty(Ready):
    """0 for completions that are short enough, falling to -1 for the longest (arXiv:2503.14476, Eq. 13)."""

    length_penalty: int
    """Tokens from which on it is -1."""
    buffer: int
    """Tokens before that over which it falls."""
    name: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"longest": self.length_penalty, "buffer": self.buffer}


@dataclass(frozen=True)
class Repetition(Ready):
    """Minus the share of the groups of words that were there before (arXiv:2502.03373, App. B)."""

    repetition: int = 3
    """Words of a group."""
    name: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"size": self.repetition}


def wait_s(attempt: int) -> float:
    """Seconds before a server that did not answer is asked again, for the `attempt`-th time."""
    return min(2.0 ** (attempt - 1), 60.0)


def longest_wait_s(timeout_s: float, retries: int) -> float:
    """Seconds until a server is given up at the latest."""
    return timeout_s * (retries + 1) + sum(wait_s(attempt) for attempt in range(1, retries + 1))


Entry = FunctionEntry | ServerEntry | JudgeEntry | Ready
READY: dict[str, type[Ready]] = {
    fields(kind)[0].name: kind for kind in (ExactMatch, Numeric, BoxedMath, Format, LengthPenalty, Repetition)
}
KINDS: dict[str, type[Entry]] = {"function": FunctionEntry, "url": ServerEntry, "judge": JudgeEntry} | READY


def as_mapping(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """An entry with its kind: text is a URL, the name of a ready function, or a function."""
    if isinstance(entry, Mapping):
        return dict(entry)
    if "://" in entry:
        return {"url": entry}
    return {entry: None} if entry in READY else {"function": entry}


def kinds_of(entry: str | Mapping[str, Any]) -> list[str]:
    """What an entry says that it is: one of the kinds, where it is right."""
    return [key for key in as_mapping(entry) if key in KINDS]


def read_entry(entry: str | Mapping[str, Any]) -> Entry:
    """An entry that was checked."""
    (kind,) = kinds_of(entry)
    return KINDS[kind](**given_in(entry))


def given_in(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an entry; what is left null where it begins is left to its default."""
    return {key: value for key, value in as_mapping(entry).items() if value is not None or key not in KINDS}


def function_of(entry: Any) -> str | None:
    """The function of the user's that an entry names, if it does."""
    named = as_mapping(entry).get("function") if isinstance(entry, str | Mapping) else None
    return named if isinstance(named, str) else None
