"""`--debug`: the same, with the traceback of what went wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignctl.cli import show
from alignctl.cli.main import main


def test_it_shows_the_traceback_and_keeps_the_exit_code(alignctl):
    """Whoever starts the command again on code 75 does so with `--debug`, too."""
    wrong = ("train", "recipe=quickstart", "sft.learning_rate=fast")
    plain, debug = alignctl(*wrong), alignctl(*wrong, "--debug")
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err.strip() in debug.err


def test_a_bug_says_so_in_one_line_and_where_its_traceback_is(monkeypatch, capsys):
    def broken(*_, **__):
        return {}["of ours"]

    monkeypatch.setattr(show, "render_config", broken)
    with pytest.raises(SystemExit) as ended:
        main(["show", "recipe=quickstart"])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "this is a bug of alignctl: KeyError: 'of ours'" in err
    log = Path(re.search(r"\S+alignctl-bug-\S+\.log", err)[0])
    assert "in broken" in log.read_text()
    log.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["show", "recipe=quickstart", "--debug"])
    assert ended.value.code == 1
    assert "KeyError: 'of ours'" in capsys.readouterr().err
