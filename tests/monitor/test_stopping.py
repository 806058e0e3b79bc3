"""Requests to stop, by real signals to this process."""

import os
import signal
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
