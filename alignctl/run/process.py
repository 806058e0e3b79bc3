"""What every process of a run does for itself. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PARENT = "ALIGNCTL_PARENT"
"""Variable of the environment with the process id of whoever starts a process of a run."""
NODE = "ALIGNCTL_NODE"
"""Variable of the environment with the number of the machine among those of a run: torchrun numbers them anew."""
_PR_SET_PDEATHSIG = 1


def node() -> int:
    """Number of this machine among those of the run."""
    return int(os.environ.get(NODE, 0))


def die_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is killed, so that none trains on unseen."""
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it was killed before we could ask
            os._exit(1)
