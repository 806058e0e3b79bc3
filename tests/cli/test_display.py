"""What a terminal shows of a running stage."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from alignctl.cli.display import Display, _live_line

ODD = "Fine,\n\x1b[31mthank\x07 you \u202e" + "y" * 300
PROGRESS = {
    "phase": "training", "notices": [], "step": 3, "max_steps": 9, "metrics": {"score": 0.5}, "tokens_per_s": None,
    "seconds_left": None,
    "samples": [
        {"prompt": "x" * 200 + "How are you?", "completion": ODD, "score": 0.25},
        {"prompt": "日本" * 60, "completion": "はい" * 60, "score": -1.0},
    ],
}  # fmt: skip
STAGE = SimpleNamespace(config=SimpleNamespace(name="ppo"))


def shown(capsys) -> str:
    with Display(every=1) as display:
        display.progress(STAGE, PROGRESS)
        if display._live:
            display._live.refresh()
    return capsys.readouterr().err


def test_a_terminal_shows_samples_in_a_line_each_without_what_would_upset_it(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    written = shown(capsys)
    assert "\x1b[31m" not in written
    assert not {"\x07", "\u202e"} & set(written)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written).splitlines()  # without rich's own
    sample = next(line for line in lines if "How are you?" in line)
    assert sample.lstrip().startswith("0.25  ...xxx")
    assert "How are you? -> Fine,  [31mthank  you  yyy" in sample
    assert len(sample) < 80
    other = next(line for line in lines if "日" in line)
    assert other.lstrip().startswith("-1  ...")
    assert len(other) < 60  # each of these takes two columns


def test_plain_lines_show_no_samples(capsys):
    written = shown(capsys)
    assert "step 3/9" in written
    assert "How are you?" not in written


def test_how_many_rows_a_phase_went_through_is_said_now_and_then(capsys):
    reading = {"phase": "reading data", "counts": {"rows": 12_000}}
    with Display(every=1) as display:
        display.progress(STAGE, reading)
        display.progress(STAGE, reading)
        display._counted_s = -1e9  # long ago
        display.progress(STAGE, reading)
    assert capsys.readouterr().err.splitlines() == ["ppo: reading data", "ppo: reading data: 12,000 rows"]


PLAIN = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def in_a_terminal(monkeypatch, columns=80):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))


LONG = PROGRESS | {
    "samples": [], "step": 12_345, "max_steps": 99_999, "tokens_per_s": 123_456.0, "seconds_left": 98_765.0,
    "metrics": {"loss": 0.12345, "rewards/accuracies": 0.98765, "rewards/margins": 12.345, "mean_token_accuracy": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", "n" * 300])
def test_the_live_line_is_one_line_and_keeps_how_far_it_is_and_how_long_it_takes(name):
    console = Console(width=80, file=io.StringIO())
    console.print(_live_line(name, LONG, 0.0, 80))
    (line,) = console.file.getvalue().splitlines()
    assert len(line) <= 80
    assert "12,345/99,999" in line
    assert line.rstrip().endswith("27 h 26 min left")


def test_measuring_shows_how_much_is_done_and_how_long_it_takes():
    console = Console(width=80, file=io.StringIO())
    measuring = {"phase": "measuring before: answers", "total": 64, "unit": "answers", "counts": {"answers": 16}}
    console.print(_live_line("dpo", measuring, 30.0, 80))
    assert "measuring before: answers 16/64  1 min 30 s left" in console.file.getvalue()


def test_phases_end_with_a_tick_and_their_time(capsys, monkeypatch):
    in_a_terminal(monkeypatch)
    with Display(every=1) as display:
        for phase in ("reading data", "loading model"):
            display.progress(STAGE, {"phase": phase})
        display.progress(STAGE, PROGRESS)
        display.finished(STAGE, 61)
    said = [line.strip() for line in PLAIN.sub("", capsys.readouterr().err).splitlines()]
    ticks = [line for line in said if "\u2713" in line]
    assert ticks == [f"ppo: \u2713 {phase}, 0 s" for phase in ("reading data", "loading model", "training")]
    assert "ppo: done in 1 min 1 s" in said


def test_notices_are_broken_between_words_in_a_terminal_and_not_at_all_in_a_file(capsys, monkeypatch):
    text, path = "words " * 30, "/" + "folder/" * 20
    with Display(every=1) as display:
        display.say(text + path)
    assert capsys.readouterr().err.splitlines() == [text + path]
    in_a_terminal(monkeypatch)
    with Display(every=1) as display:
        display.say(text + path)
    lines = [line.strip() for line in PLAIN.sub("", capsys.readouterr().err).splitlines()]
    assert path in lines
    assert max(len(line) for line in lines if line != path) <= 80
    assert " ".join(lines).split() == (text + path).split()
