"""Functions and chat templates are read before anything is loaded, and not run."""

from __future__ import annotations

import pytest

from alignctl.checks.code import check_function, check_template
from alignctl.data.templates import TEMPLATES

SOURCE = """
import os
from json import dumps as written
raise SystemExit("it was run")
def short(completions): return [0.0] * len(completions)
class Judge: pass
first, second = min, max
if os.name: third = min
"""


@pytest.mark.parametrize("name", ["short", "Judge", "first", "second", "third", "written", "os"])
def test_names_that_are_there(tmp_path, name):
    (tmp_path / "mine.py").write_text(SOURCE)
    assert not list(check_function("f", f"{tmp_path / 'mine.py'}:{name}"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SOURCE, "no function `shorter`"),
        ("def shorter(:\n", "line 1, is no Python"),
        ("\0", "is no Python"),
        ("(" * 500, "is no Python"),
        ("def long(): shorter = 1", "no function `shorter`"),
        (None, "there is no file"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, source, words):
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    (problem,) = check_function("sft.reward_funcs", f"{file}:shorter")
    assert words in problem.message
    assert str(file) in problem.message


@pytest.mark.parametrize(
    "source", ["from json import *\n", "globals()['shorter'] = 1\n", "def __getattr__(name): ...\n"]
)
def test_names_that_nobody_can_know(tmp_path, source):
    (tmp_path / "mine.py").write_text(source)
    assert not list(check_function("f", f"{tmp_path / 'mine.py'}:shorter"))


def test_modules():
    assert not list(check_function("f", "json:dumps"))
    assert not list(check_function("f", "xml.dom.minidom:parse"))
    assert not list(check_function("f", "no_such_module.anywhere:f"))  # it may be where the stage runs
    (problem,) = check_function("f", "json.encoder:JSONEncode")
    assert "`JSONEncode`" in problem.message
    assert "`JSONEncoder`" in problem.hint


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda one: one.name)
def test_templates_that_come_with_alignctl(template):
    assert not list(check_template("t", template.file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ a", "is no Jinja, line 1"),
        ("a\n{% if x %}", "line 2"),
        ("{% nope %}", "nope"),
        ("{% include 'a' %}", "cannot take in others"),
        ("{% from 'a' import b %}", "cannot take in others"),
        ("{{ " + "[" * 5000, "too deeply"),
        ("a" * 1_000_001, "1,000,001 characters"),
    ],
)
def test_what_is_wrong_with_a_template(text, words):
    (problem,) = check_template("model.chat_template", text)
    assert words in problem.message
    assert "model.chat_template" in problem.message
