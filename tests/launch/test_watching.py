"""Which processes count as stuck: real ones, that say what they do and then wait or work."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from alignctl.launch import watching
from alignctl.launch.watching import Workers
from alignctl.run.paths import StagePaths

SAYS = """
import sys, time
from pathlib import Path
from alignctl.monitor import heartbeat
from alignctl.run.paths import StagePaths
heartbeat._WORK_EVERY_S = 0.2
if sys.argv[2] != "nothing":
    said = heartbeat.Heartbeat(StagePaths(Path(sys.argv[1])), 0)
    said.beat(sys.argv[2])
while True:
    time.sleep(60) if sys.argv[3] == "waits" else sum(range(1000))
"""


@pytest.mark.parametrize(
    ("doing", "then", "stuck"),
    [
        ("nothing", "waits", True),
        ("loading model", "waits", True),
        ("loading model", "works", False),
        ("training", "works", True),
        ("rehearsing: reading data", "waits", True),
    ],
)
def test_a_phase_in_which_nothing_happens_is_stuck(tmp_path, monkeypatch, doing, then, stuck):
    monkeypatch.setattr(watching, "_QUIET_S", 2)
    paths = StagePaths(tmp_path)
    seen = Workers(paths)
    process = subprocess.Popen([sys.executable, "-c", SAYS, str(tmp_path), doing, then])
    try:
        until = time.monotonic() + 5  # the timeout is 2 s, and twice that passes between a look and the next at most
        while time.monotonic() < until and not seen.stuck(2):
            seen.look()
            time.sleep(0.1)
        assert seen.stuck(2) == stuck
        assert seen.end_at_once() == (doing.endswith(("model", "data")))
    finally:
        process.kill()
        process.wait()
