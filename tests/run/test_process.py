"""What a process of a run does for itself."""

import os
import subprocess
import sys

import pytest

from alignctl.run.process import PARENT


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_whose_parent_was_killed_before_it_could_ask_ends():
    """Its parent is then another process than the one that started it."""
    ask = "from alignctl.run.process import die_with_parent; die_with_parent()"
    for parent, code in ((os.getpid(), 0), (1, 1)):
        done = subprocess.run([sys.executable, "-c", ask], env=os.environ | {PARENT: str(parent)}, check=False)
        assert done.returncode == code
