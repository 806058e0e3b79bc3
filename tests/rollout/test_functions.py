"""Reward functions in processes of their own: what they are given, what becomes of those that fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from alignctl.errors import RequestError
from alignctl.rollout.functions import FunctionFailed, ProcessFunction

FUNCTIONS = """
import os
import subprocess
import time

def process(completions):
    return [os.getpid()] * len(completions)

def some(completions, scale=1.0):
    return [scale * len(one) if one else None for one in completions]

def fails(prompts, completions):
    return [1 / (one != "bad") for one in completions]

def hangs(completions):
    time.sleep(600 * ("bad" in completions))
    return [0.0 for _ in completions]

def dies(completions):
    if "bad" in completions:
        os._exit(7)
    return [0.0 for _ in completions]

def together(completions):
    if len(completions) > 1:
        raise ValueError("too many")
    return [0.0]

def words(completions):
    return ["good" for _ in completions]

def few(completions):
    return completions[1:] and [0.0]

def alone(completions):
    time.sleep(0.7)
    return [0.0 for _ in completions] if len(completions) < 2 else time.sleep(600)

def starts(completions):
    child = subprocess.Popen(["sleep", "600"])
    return [child.pid] * len(completions)

calls = []

def counts(completions):
    calls.append(completions)
    return [len(calls)] * len(completions)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    return tmp_path / "rewards.py"


def test_each_part_has_a_process_and_groups_stay_together(file):
    function = ProcessFunction(f"{file}:process", processes=2)
    found = function([range(0, 2), range(2, 4), range(4, 6)], completions=list("abcdef"))
    assert found[0] == found[1] != found[2] == found[3] == found[4] == found[5]
    assert os.getpid() not in found
    assert len(set(function([range(0, 1)], completions=["a"]))) == 1  # fewer groups than processes


def test_settings_and_no_score(file):
    function = ProcessFunction(f"{file}:some", scale=2.0)
    assert function(completions=["ab", "", "c"]) == [4.0, None, 2.0]


def test_what_a_function_holds_stays_from_call_to_call(file):
    function = ProcessFunction(f"{file}:counts")
    assert [function(completions=["a"]) for _ in range(3)] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    ("name", "said", "member"),
    [
        ("fails", r"raised ZeroDivisionError: division by zero \(.*rewards.py, line 13\)", 2),
        ("hangs", "did not return within 1 s", 2),
        ("alone", "did not return within 1 s", None),
        ("dies", "ended its process, with code 7", 2),
        ("together", "raised ValueError: too many", None),
        ("words", "gave what is no number: could not convert string to float: 'good'", 0),
        ("few", "gave 1 numbers for 3 completions", None),
    ],
)
def test_a_function_that_fails_is_told_with_the_completion(file, name, said, member):
    function = ProcessFunction(f"{file}:{name}", timeout_s=1)
    given = {"completions": ["good", "fine", "bad"], "prompts": ["a", "b", "c"]}
    given = {key: values for key, values in given.items() if key in function.__signature__.parameters}
    with pytest.raises(FunctionFailed, match=said) as raised:
        function(**given)
    assert raised.value.member == member


def test_no_process_is_left(file):
    function = ProcessFunction(f"{file}:process", processes=2)
    pids = {int(pid) for pid in function([range(1), range(1, 2)], completions=["a", "b"])}
    assert len(pids) == 2
    del function
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < until


def test_what_a_function_starts_can_be_asked_to_end_and_ends_with_it(file):
    function = ProcessFunction(f"{file}:starts")
    first, second = (int(function(completions=["a"])[0]) for _ in range(2))
    os.kill(first, signal.SIGTERM)
    until = time.monotonic() + 10
    while state_of(first) not in ("Z", None):
        assert time.monotonic() < until
    del function
    while state_of(second) not in ("Z", None):
        assert time.monotonic() < until


def state_of(pid):
    """As Linux says, `Z` where it has ended and nobody has asked how; None where it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise OSError('no such weights')", "cannot be loaded: its module raised OSError: no such weights"),
        ("import no_such_module", "cannot be loaded: its module raised ModuleNotFoundError: .*no_such_module"),
        ("open('no_such_file')", "cannot be loaded: its module raised FileNotFoundError"),
        ("None.lower", "cannot be loaded: its module raised AttributeError"),
        ("", "there is no reward function .*: module 'broken' has no attribute 'f'"),
    ],
)
def test_a_module_that_raises_is_the_user_s_to_mend(tmp_path, content, said):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(RequestError, match=said):
        ProcessFunction(f"{tmp_path / 'broken.py'}:f")


def test_a_module_that_is_none_is_told():
    with pytest.raises(RequestError, match="there is no reward function .*: No module named 'no_such_module'"):
        ProcessFunction("no_such_module.part:f")
