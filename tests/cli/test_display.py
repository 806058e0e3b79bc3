"""What a terminal shows of a running stage."""

import re
from types import SimpleNamespace

from alignctl.cli.display import Display

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
