"""Entry of the process that runs one stage, or one of several that do: `python -m alignctl.worker RUN_DIR STAGE`.

Reads only frozen files. Which of the processes it is comes from torchrun's environment. Exit codes are those of the
command (errors.py). What went wrong is left in a file for the process that started this one; bugs keep their traceback,
in the log.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignctl.cache import private_dir
from alignctl.config.schema import wants_bitsandbytes
from alignctl.config.secrets import masked_output
from alignctl.config.stages import StageConfig
from alignctl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, AlignctlError
from alignctl.methods.registry import methods, resolve
from alignctl.monitor.heartbeat import own_beat
from alignctl.monitor.stopping import StopSignal
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import leave_json, read_json
from alignctl.run.frozen import read_stage
from alignctl.run.owner import plain
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.process import die_with_parent


def main(run_dir: str, stage_name: str) -> int:
    """Runs one stage of a frozen run. Returns the exit code."""
    die_with_parent()
    paths = RunPaths(Path(run_dir))
    stage_paths = paths.stage(stage_name)
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        _write_to(stage_paths.rank_log(stage_paths.last_attempt(), rank))
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # whoever finds us stuck asks where
    stop = StopSignal()
    try:
        stage, weights = read_stage(paths, stage_name)
        if stage.distributed.type == "none":
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # else transformers takes all GPUs, one thread for each
        if not _may_quantize(stage, weights):
            # peft imports it where it is installed, and it torch's compiler: a fifth of what a worker imports.
            sys.modules["bitsandbytes"] = None  # Python's way of saying that there is none

        # What torch compiles is kept for later runs; /tmp, where it would lie, is emptied.
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_dir("inductor"))
        gc.disable()  # half a million objects that stay: not looked through while they are made, nor ever again
        run_stage = resolve(methods()[stage.method].stage_function)  # imports torch: after the signals are ours
        gc.freeze()
        gc.enable()
        run_stage(stage, weights, stage_paths, stop)
        return 0
    except KeyboardInterrupt:
        code = EXIT_STOPPED if newest_checkpoint(stage_paths.checkpoints) else EXIT_INTERRUPTED
        _leave_error(stage_paths, rank, code)
        return code
    except AlignctlError as error:
        if error.__cause__:
            traceback.print_exc()  # for whoever looks into the log
        problems = [{"message": problem.message, "hint": problem.hint} for problem in error.problems]
        _leave_error(stage_paths, rank, error.exit_code, problems=problems)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        _leave_error(stage_paths, rank, EXIT_FAILED, traceback=traceback.format_exc())
        return EXIT_FAILED


def _may_quantize(stage: StageConfig, weights: Mapping[str, str | None]) -> bool:
    """Whether 4-bit weights or 8-bit optimizer states could be wanted: what a checkpoint elsewhere is, nobody knows
    yet."""
    if wants_bitsandbytes(stage.name, stage.peft, stage.trainer.get("optim")):
        return True
    configs = [read_json(Path(source, "config.json")) for source in weights.values() if source]
    return any(config is None or "quantization_config" in config for config in configs)


def _leave_error(paths: StagePaths, rank: int, exit_code: int, **error: Any) -> None:
    step = own_beat(paths, rank).get("step")
    facts = {"rank": rank, "host": socket.gethostname(), "step": step, "time": time.time()}
    leave_json(paths.error(rank), facts | {"exit_code": exit_code} | error)


def _write_to(log: Path) -> None:
    """Sends all that this process and its libraries print to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = plain(str(log), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())


if __name__ == "__main__":
    with masked_output():
        code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # library threads must not hold up the end, nor change the code
