"""Requests to stop, by real signals to this process."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from alignctl.monitor.stopping import SAME_REQUEST_S, STOPPING, StopSignal


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between two instructions


def test_signals_close_together_are_one_request_and_a_later_one_is_the_second(stop):
    stop.waits = True
    for number in (*STOPPING, *STOPPING):
        send(number)
    assert stop.requested
    time.sleep(SAME_REQUEST_S)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)


def test_a_request_where_nobody_looks_ends_at_once_and_its_doubles_do_not_disturb_the_end(stop):
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGUSR1)
    send(signal.SIGTERM)


HANGS_UP = """
import os, signal, sys, time
from alignctl.monitor.stopping import StopSignal
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)  # whatever it inherits
stop = StopSignal()
stop.waits = True
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    time.sleep(0.01)
    if stop.requested:
        break
else:
    sys.exit(7)
print("saving", flush=True)
print("saving", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize(("how", "looks", "code"), [("plain", 6000, 0), ("nohup", 30, 7)])
def test_a_terminal_that_closes_is_a_request_to_stop_unless_that_is_ignored(tmp_path, how, looks, code):
    """Under a terminal that is gone, to which nothing can be written any more."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", HANGS_UP, str(tmp_path / "saved"), how, str(looks)])
    try:
        assert b"ready" in os.read(terminal, 100)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert (tmp_path / "saved").exists() == (how == "plain")


def test_what_goes_to_a_file_goes_on_to_it(tmp_path):
    with (tmp_path / "log").open("w") as log:
        asked = subprocess.Popen(
            [sys.executable, "-c", HANGS_UP, tmp_path / "saved", "plain", "6000"], stdout=log, stderr=log
        )
        while "ready" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        asked.send_signal(signal.SIGHUP)
        assert asked.wait() == 0
    assert (tmp_path / "log").read_text() == "ready\nsaving\nsaving\n"
