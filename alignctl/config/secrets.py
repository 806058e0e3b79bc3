"""What must not be written to disk or shown: tokens, keys and passwords. Torch-free.

A variable of the environment that holds one is named in what is written, `${oc.env:HF_TOKEN}`, and filled in only by
the process that needs it. Whatever else is written or printed is masked: the values of such variables, and what looks
like a token of a known service. compose.py leaves the names, run/frozen.py fills them in; run/files.py, the commands
and the workers mask.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote

from alignctl.config.schema import PATHS

MASK = "***"
PATH_KEYS = {"run_dir", "start", "output", "command", "log"} | {key for keys in PATHS.values() for key in keys}
"""What is found under these is needed as it is."""
_PATHS_BY_NAME = re.compile(r"\.(roles|role_paths|data\.eval)\.")  # as well, whatever name they stand under
_LEAST = 6  # characters of a value that is looked for in texts: shorter ones are in every other word
_NUMBERS = {int, float, bool}
_PATH_MAX = 4096  # characters of a path, as Linux has it
_REST_OF_NAME = re.compile(r"[^/\s'\"`,;:)]*")
_SECRET_KEY = re.compile(
    r"(^|[._])(hub_token|access_token|auth_token|api_key|apikey|secret_key|passwd|password|secret)$|(^|\.)token$", re.I
)
_SECRET_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.I)
# Tokens of the Hub, GitHub, GitLab, OpenAI-like services, Slack and AWS, and `user:password@` of an address.
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|xox[abeprs]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16})(?![A-Za-z0-9])"
    r"|(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)"
)
_LEFT = re.compile(r"\$\{oc\.env:(\w+)\}")
_taken: set[str] = set()
"""Variables that are secret whatever they are called: a key that is secret takes them."""


def is_secret(key: str) -> bool:
    """Whether the value under a dotted key is a token, a key or a password."""
    return _SECRET_KEY.search(key) is not None


def is_secret_variable(name: str) -> bool:
    """Whether a variable of the environment holds one, by its name or by who takes it."""
    return name in _taken or _SECRET_VARIABLE.search(name) is not None


def takes_variables(names: Iterator[str] | set[str]) -> None:
    """Has variables of the environment count as secret in this process: something secret takes them."""
    _taken.update(names)


def left_out(name: str) -> str:
    """What stands in a config for the value of a variable that is secret."""
    return f"${{oc.env:{name}}}"


def variables(value: Any) -> set[str]:
    """The variables that are to be filled into a config, or a part of one."""
    return {name for _, text in _texts(value) for name in _LEFT.findall(text)}


def filled_in(value: Any) -> Any:
    """A config with the values of those variables, for the process that works with them.

    Raises:
        KeyError: One is not set.
    """
    if isinstance(value, Mapping):
        return {name: filled_in(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [filled_in(item) for item in value]
    return _LEFT.sub(lambda found: os.environ[found[1]], value) if isinstance(value, str) else value


def in_shell(text: str) -> str:
    """The same for the text of a shell script, which takes them from its own environment."""
    return _LEFT.sub(r"${\1}", text)


def named_variables(config: Any) -> set[str]:
    """Variables that a config takes for something secret: to be filled in, or by the name under `key_from`."""
    return variables(config) | {text for key, text in _texts(config) if key == "key_from"}


def take_note(config: Any) -> None:
    """Notes whose values are masked: variables that a config takes for something secret."""
    takes_variables(named_variables(config))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a config, with the key each stands under."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def looks_secret(value: Any) -> bool:
    """Whether a text holds what looks like a token of a known service, or the value of a variable that is secret."""
    return isinstance(value, str) and mask_text(value) != value


def mask(value: Any) -> Any:
    """Copies a config with every secret replaced by `***`. Paths stay as they are: a worker has to find them."""
    return _masked(value, "", _held())


def _masked(value: Any, key: str, held: re.Pattern[str]) -> Any:
    """What stands under a dotted key, masked."""
    if isinstance(value, Mapping):
        return {name: _masked(item, f"{key}.{name}", held) for name, item in value.items()}
    secret = is_secret(key)
    if isinstance(value, (list, tuple)):
        if not secret and set(map(type, value)) <= _NUMBERS:  # token ids come by the million
            return list(value)
        return [_masked(item, key, held) for item in value]
    if secret and value is not None and not (isinstance(value, str) and variables(value)):
        return MASK
    if not isinstance(value, str) or key.rpartition(".")[2] in PATH_KEYS or _PATHS_BY_NAME.search(key):
        return value
    return _masked_text(value, held)


def mask_override(text: str) -> str:
    """An override as it was typed, its value masked where it is a secret."""
    key, separator, value = text.partition("=")
    if separator and is_secret(key.lstrip("+~")) and not value.strip("'\"").startswith("${"):
        return f"{key}={MASK}"
    return mask_text(text)


def mask_text(text: str) -> str:
    """A text without what looks like a token, and without the values of variables that are secret."""
    return _masked_text(text, _held()) if len(text) >= _LEAST else text


def _masked_text(text: str, held: re.Pattern[str]) -> str:
    return _SECRET_VALUE.sub(MASK, held.sub(lambda found: found[0] if _in_path(found) else MASK, text))


def _in_path(found: re.Match[str]) -> bool:
    """Whether a value is part of the name of a file or folder that is here: JUPYTER_TOKEN may well be `jupyter`, and
    all that one has be below /home/jupyter."""
    before = found.string[max(0, found.start() - _PATH_MAX) : found.start()]
    name = found[0] + _REST_OF_NAME.match(found.string, found.end())[0]  # type: ignore[index]
    return any(os.path.exists(before[slash.start() :] + name) for slash in re.finditer("/", before))


def _held() -> re.Pattern[str]:
    """Finds the values of variables that are secret now."""
    return _pattern(
        frozenset(value for name, value in os.environ.items() if len(value) >= _LEAST and is_secret_variable(name))
    )


@lru_cache(maxsize=8)
def _pattern(held: frozenset[str]) -> re.Pattern[str]:
    """Finds values as they are, and as JSON and URLs write them; of a key with several lines each line. No numbers, and
    no files, whose content is what counts."""
    found = set()
    for value in held:
        if _is_number(value) or os.path.exists(value):
            continue
        lines = [line.strip() for line in value.splitlines() if len(line.strip()) >= _LEAST]
        found |= {form for line in lines for form in (line, json.dumps(line)[1:-1], quote(line, safe=""))}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Masked:
    """A stream of text through which no secret gets."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask_text(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def masked_output() -> Iterator[None]:
    """Masks what this process prints."""
    with ExitStack() as streams:
        streams.enter_context(redirect_stdout(Masked(sys.stdout)))  # type: ignore[type-var]
        streams.enter_context(redirect_stderr(Masked(sys.stderr)))  # type: ignore[type-var]
        yield
