"""How errors and lists are laid out in a terminal, and that files have them as they are."""

import pytest

from alignctl.cli import terminal
from alignctl.cli.terminal import say_error, two_columns
from alignctl.errors import RequestError

FORCED = {"FORCE_COLOR": "1"}
ERROR = RequestError("`dpo.beta` is wrong, got `[1]`", "set `dpo.beta=0.1`")


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({}, "error:"),
        ({"FORCE_COLOR": "1"}, "\x1b[31merror:\x1b[0m"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, "error:"),
    ],
    ids=["a file", "a terminal", "no colour"],
)
def test_errors_have_colour_in_a_terminal(capsys, monkeypatch, variables, begins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    say_error(ERROR)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{begins} `dpo.beta` is wrong, got `[1]`"
    assert said[1].endswith(" set `dpo.beta=0.1`")
    assert ("\x1b" in said[1]) == ("\x1b" in begins)


@pytest.mark.parametrize("wide", [80, 40, 20])
def test_lists_break_between_words(monkeypatch, wide):
    said = "DPO of a checkpoint of yours on preference-pairs of yours: give model.path and data.path."
    monkeypatch.setattr(terminal, "columns", lambda: wide)
    lines = two_columns("dpo_local", said, 20).splitlines()
    assert max(map(len, lines)) <= max(wide, 30)
    assert " ".join(lines).split() == ["dpo_local", *said.split()]
    monkeypatch.setattr(terminal, "columns", lambda: None)
    assert two_columns("dpo_local", said, 20) == f"{'dpo_local':<20}  {said}"
