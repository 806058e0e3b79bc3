"""Reward functions in processes of their own: what they are given, what becomes of those that fail."""

from __future__ import annotations

import os
import time

import pytest

from alignctl.errors import RequestError
from alignctl.rollout.functions import FunctionFailed, ProcessFunction

FUNCTIONS = """
import os
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
        ("fails", r"raised ZeroDivisionError: division by zero \(.*rewards.py, line 12\)", 2),
        ("hangs", "did not return within 1 s", 2),
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


def test_a_module_that_raises_is_the_user_s_to_mend(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('no such weights')")
    with pytest.raises(RequestError, match="cannot be loaded: its module raised OSError: no such weights"):
        ProcessFunction(f"{tmp_path / 'broken.py'}:f")
