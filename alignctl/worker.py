"""Entry of the process that runs one stage: `python -m alignctl.worker RUN_DIR STAGE`. Reads only frozen files.

Exit codes are those of the command (errors.py). What went wrong is left in the stage's error.json for the process that
started this one; bugs keep their traceback, in the log.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from alignctl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, AlignctlError
from alignctl.monitor.stopping import StopSignal
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import write_json
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths

_PR_SET_PDEATHSIG = 1


def main(run_dir: str, stage_name: str) -> int:
    """Runs one stage of a frozen run. Returns the exit code."""
    _die_with_parent()
    paths = RunPaths(Path(run_dir))
    stage_paths = paths.stage(stage_name)
    stop = StopSignal()
    try:
        from alignctl.stage import run_stage  # imports torch: after the signals are ours

        stage, weights = read_stage(paths, stage_name)
        run_stage(stage, weights, stage_paths, stop)
        return 0
    except KeyboardInterrupt:
        saved = newest_checkpoint(stage_paths.checkpoints)
        return EXIT_STOPPED if saved else EXIT_INTERRUPTED
    except AlignctlError as error:
        problems = [{"message": problem.message, "hint": problem.hint} for problem in error.problems]
        write_json(stage_paths.error, {"problems": problems})
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _die_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is killed, so that none trains on unseen."""
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # library threads must not hold up the end, nor change the code
