"""Inputs that nobody would type, and what the command says to them: made from a seed, answered in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignctl.cli.main import main
from alignctl.errors import EXIT_DONE, EXIT_LAUNCH, EXIT_REQUEST

SECONDS = 10
_CODES = (EXIT_DONE, EXIT_REQUEST, EXIT_LAUNCH)
_SHOWN = 2_000  # characters


class Hangs(BaseException):
    """It was not answered in time."""


class Begins(BaseException):
    """It was taken, and a process would begin."""


@dataclass(frozen=True)
class Answer:
    """What the command said."""

    code: int
    out: str
    err: str


def answer(arguments: Sequence[str], folder: Path) -> Answer:
    """What `alignctl ARGUMENTS` says in a folder, without starting what trains: code 0 where it would."""
    out, err = io.StringIO(), io.StringIO()
    here, popen = Path.cwd(), subprocess.Popen
    before = {number: signal.signal(number, _hangs) for number in (signal.SIGPROF, signal.SIGALRM)}
    os.chdir(folder)
    subprocess.Popen = _begins  # type: ignore[assignment, misc]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing, and of waiting on a machine that others use, too
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Begins:
        code = EXIT_DONE
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        subprocess.Popen = popen  # type: ignore[misc]
        os.chdir(here)
    return Answer(code, out.getvalue(), err.getvalue())


def _hangs(*_: object) -> None:
    raise Hangs


def _begins(*_: object, **__: object) -> None:
    raise Begins


def flaw(found: Answer, named: Sequence[str]) -> str | None:
    """What is wrong with an answer; None where it is one that a user can act on.

    Args:
        named: Words of which a refusal has to have one: the key, the file.
    """
    if found.code not in _CODES:
        return f"code {found.code}"
    if "Traceback" in found.err or "bug" in found.err:
        return "a traceback"
    if found.code == EXIT_DONE or found.err.startswith("Usage: ") and "\n\nOptions:" in found.err:
        return None
    said = [line for line in found.err.splitlines() if line.lower().startswith("error: ")]
    if not said or not all(len(line) > len("error: ") for line in said):
        return "no message"
    if max(map(len, found.err.splitlines())) > _SHOWN:
        return "a message that nobody reads"
    if not any(word in found.err for word in named):
        return f"a message that names none of {', '.join(named)}"
    return None


NUMBERS = ("0", "-1", "1", "2", "0.5", "-0.5", "1e999", "nan", "inf", "-inf", "4294967296", "1" + "0" * 30, "9" * 5000,
           "1e-320", "00", "0x10", "1_000")  # fmt: skip
TEXTS = ("", "a", "none", "null", "true", "yes", "/", ".", "..", "~nobody/x", "~", "x" * 300, '"a\\0b"', "\ud800",
"\u202e",
         "é", "a b", "a=b", "$", "${", "${a}", "${seed}", "${sft}", "${sft.${seed}}", "${oc.env:HOME}",
         "${oc.env:NO_SUCH}",
         "${nope:1}", "???", "a,b", "'a", '"', "[", "]", "{", "}", "{}", "[]", "[[]]", "[a]", "[1,2]", "[null]",
         "{a: 1}",
         "{a: {b: [1]}}", "{1: 2}", "{a:1}", "range(1,3)", "range(1,3,0)", "choice(a,b)", "interval(0,1)", "glob(*)",
         "sort(1,2)", "shuffle(1,2)", "int(a)", "str(1)", "extend_list(1)", "bool(2)", "json_str({a:1})", "tag(a,1)",
         "\n", "\t", "\\", "#", "*", "|", "!!binary aGk=", "!!python/name:os.system", "@", ":", "::", "file.py:f",
         "/dev/null", "/proc/self/mem", "/etc/shadow", "http://", "s3://a/b", "a/b", "owner/name", "builtin:x",
         "{{", "{% for x in y %}", "{{ 1 / 0 }}", "{% include 'a' %}")  # fmt: skip
VALUES = NUMBERS + TEXTS
SECTIONS = ("model", "data", "peft", "eval", "tracker", "distributed", "launcher")


class Maker:
    """Makes inputs, the same ones from the same seed."""

    def __init__(self, seed: int, keys: Sequence[str], groups: Sequence[str], fields: Sequence[str]):
        """Takes keys that a recipe lists, its groups, and fields of its stage."""
        self.some = random.Random(seed)
        self._keys, self._groups, self._fields = keys, groups, fields
        self._inside = ("path", "type", "x", "config", "r", "a.b", "stages.sft", "0")

    def key(self) -> str:
        some = self.some
        return some.choice(
            [
                some.choice(self._keys),
                some.choice(self._keys).partition(".")[0],
                f"sft.{some.choice(self._fields)}",
                f"sft.{some.choice(self._fields)}",
                f"{some.choice(SECTIONS)}.{some.choice(self._inside)}",
                f"sft.{some.choice(SECTIONS)}",
                some.choice(("seed", "stages", "run_dir", "x", "", ".", "sft.", ".sft", "a..b", "hydra",
                "hydra.run.dir",
                             "hydra.searchpath", "defaults", "é", "1", "x" * 300, "sft.x" * 60)),
            ]
        )  # fmt: skip

    def override(self) -> tuple[str, list[str]]:
        """An override, and the words of which a refusal of it has to have one."""
        some, key = self.some, self.key()
        named = [part[:20] for part in re.split(r"[.@]", key) if part] or ["="]
        named += ["argument"]  # one that is no text
        form = some.randrange(10)
        if form == 0:
            return f"~{key}", named
        if form == 1:
            group = some.choice(self._groups)
            return f"{some.choice(('', '+', '~', '++'))}{group}={some.choice(VALUES)}", [group.partition("@")[0]]
        value = some.choice(VALUES)
        if form == 2:
            value = some.choice((f"[{value},{some.choice(VALUES)}]", f"{{a:{value}}}", f'"{value}"', f"'{value}'"))
        return f"{some.choice(('', '', '', '+', '++'))}{key}={value}", named

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A composed config with one or two of its values others, or with one more."""
        some = self.some
        for _ in range(some.choice((1, 1, 2))):
            if some.randrange(2):
                config = self._other(config)
            else:
                section = some.choice(["sft", "sft", *SECTIONS])
                known = config.get(section) if isinstance(config, dict) else None
                key = (
                    some.choice(self._fields) if section == "sft" else some.choice(("path", "type", "config", "r", "x"))
                )
                if isinstance(known, dict):
                    config = config | {section: known | {key: self._other(None)}}
        return config if isinstance(config, dict) else {}

    def line(self) -> list[str]:
        """A command line as somebody might type it who has not read how."""
        some = self.some
        words = ["train", "--dry-run", "show", "status", "logs", "recipes", "methods", "templates", "cache", "list",
                 "clear", "data", "preview", "submit", "resume", "cancel", "completion", "bash", "--json", "--stage",
                 "--rank", "-1", "--all", "--multirun", "-m", "--recipe-dir", ".", "/", "recipe=sft_local", "recipe=",
                 "recipe=/", "--as", "1/2", "0/0", "a/b", "--for", "sft", "--model", "--row", "0", "--older-than", "x",
                 "9" * 400 + "w", "rehearse", "--", "-h", "--help", "--version", "--tokens", "seed=1,2",
                 "seed=range(1,1)",
                 *some.choices(VALUES, k=4)]  # fmt: skip
        first = some.choice(("train", "show", "status", "logs", "recipes", "templates", "cache", "data", "submit",
                             "resume", "cancel", "completion", "rehearse", *TEXTS[:4]))  # fmt: skip
        return [first, *some.choices(words, k=some.randrange(5))]

    def recipe(self) -> str:
        """A recipe, broken at one place."""
        some = self.some
        lines = ["defaults:", "  - /base", "  - /data: local", "  - /method@sft: sft", "  - _self_", "stages: [sft]",
                 "model:", "  path: m", "data:", "  path: rows.jsonl", "sft:", "  max_length: 64"]  # fmt: skip
        odd = ["- x", "x", ": 1", "1: 2", "? [a]\n: b", "true: 1", "null: 1", "~: 1", "2020-01-01: 1", "sft: null",
        "sft: []",
               "sft: 3", "hydra: null", "hydra: {}", "hydra: {searchpath: ['pkg://antigravity']}", "defaults: a",
               "defaults: null", "defaults: 3", "defaults: {}", "defaults: []", "  - /data: local\n    /base: x",
               "  - 3",
               "  - null", "  - []", "  - /nope", "  - /data: nope", "  - /data: [local, local]",
               "  - /data@a.b.c: local",
               "  - override /data: x", "  - optional /data: x", "  - override hydra/launcher: x", "  - /data: ${x}",
               "  - ../..", "  - /base: null", "  - _self_", "x: !!binary aGVsbG8=", "x: !!set {a, b}",
               "x: !!python/tuple [1]",
               "x: !!float nope", "x: !!int a", "x: !!timestamp 2001-12-14", "seed: " + "9" * 5000, "seed: 1e400",
               "seed: .nan",
               "x: 2001-12-14", 'x: "a\\0b"', "x: &a [*a]", "x: &a {b: *a}", "<<: {a: 1}", "<<: 3", "x: ${x}",
               "x: ${y}",
               "x: ${oc.env:NO_SUCH}", "x: ${nope:1}", "x: ${", "x: '${a'", "\tx: 1", "x: [", "x: {", "x: |", "x: >",
               "%YAML 3",
               "---", "--- a", "...", "x: *a", "@x: 1", "`", "\x00", "\ufeff", "é: é", f"{'x' * 300}: {{method: sft}}",
               "seed: {method: sft}", "# @package a", "# @package _global_", "sft: {from: [a]}", "stages: sft",
               "stages: [sft, sft]",
               "stages: [1]", "stages: [[sft]]", "stages: {a: b}", "stages: null", "model: x", "model: [1]",
               "model: null",
               "launcher: {stages: {sft: 3}}", "launcher: {stages: [1]}", "data: {mix: [1]}", "data: {mix: {a: 1}}",
               "peft: 1",
               "data: {path: [1]}", "data: {columns: [a]}", "eval: {judge: [a]}", "distributed: {config: [1]}",
               "tracker: {x: 1}",
               "x: " + "[" * 2000, "x: " + "{a: " * 500]  # fmt: skip
        sections = some.choices(SECTIONS, k=9), some.choices(("path", "type", "a", "1"), k=9)
        values = some.choices(("[1]", "{a: 1}", "3", "null", "true", "1.5", "''"), k=9)
        odd += [f"{section}: {{{key}: {value}}}" for section, key, value in zip(*sections, values, strict=True)]
        match some.randrange(6):
            case 0:
                lines[some.randrange(len(lines))] = some.choice(odd)
            case 1:
                del lines[some.randrange(len(lines))]
                lines.insert(some.randrange(len(lines)), some.choice(odd))
            case 2:
                text = "\n".join(lines)
                at = some.randrange(len(text))
                return (
                    text[:at]
                    + some.choice(("\x00", "\t", ":", "{", "[", "'", '"', "&a", "*a", "!", "%", "|", "\n", "${"))
                    + text[at:]
                )
            case _:
                lines.insert(some.choice((0, 1, 4, 5, len(lines))), some.choice(odd))
        return "\n".join(lines) + "\n"

    def damaged(self, text: str) -> str:
        """A JSON text, or several in lines, with one of its values another, or torn."""
        some = self.some
        if some.randrange(5) == 0:
            at = some.randrange(len(text))
            return some.choice((text[:at], text[:at] + "\x00" + text[at:], text + text, "", "null", "[]", "3", '"a"',
            "{}",
                                "[" * 5000, '{"a": ' * 3000, "9" * 5000, "NaN", "\ud800"[:0] + "{"))  # fmt: skip
        lines = text.splitlines() if text.count("\n{") else [text]
        number = some.randrange(len(lines))
        lines[number] = json.dumps(self._other(json.loads(lines[number])))
        return "\n".join(lines)

    def _other(self, value: Any) -> Any:
        """The same with one part replaced or gone."""
        some = self.some
        if isinstance(value, dict) and value and some.randrange(6):
            key = some.choice(list(value))
            if not some.randrange(4):
                return {name: one for name, one in value.items() if name != key}
            return value | {key: self._other(value[key])}
        if isinstance(value, list) and value and some.randrange(6):
            at = some.randrange(len(value))
            return [*value[:at], self._other(value[at]), *value[at + 1 :]]
        return some.choice(
            (
                None,
                0,
                -1,
                1.5,
                float("inf"),
                [None],
                [[]],
                {"": 1},
                {"a": {"b": []}},
                "~nobody/x",
                "???",
                10**40,
                True,
                "",
                "a",
                "\x00",
                "a/b",
                "../x",
                [],
                [1],
                {},
                {"a": 1},
                "x" * 300,
            )
        )


@contextlib.contextmanager
def changed(file: Path, text: str) -> Iterator[None]:
    """A file with another content, which gets its own back."""
    before = file.read_bytes()
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        yield
    finally:
        file.write_bytes(before)
