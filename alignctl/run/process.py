"""What every process of a run does for itself. Torch-free."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is killed, so that none trains on unseen."""
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
