"""`--debug`: the same, with the traceback of what went wrong."""

from __future__ import annotations


def test_it_shows_the_traceback_and_keeps_the_exit_code(alignctl):
    """Whoever starts the command again on code 75 does so with `--debug`, too."""
    wrong = ("train", "recipe=quickstart", "sft.learning_rate=fast")
    plain, debug = alignctl(*wrong), alignctl(*wrong, "--debug")
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err.strip() in debug.err
