"""Entry of the process that starts a machine's workers: `python -m alignctl.agent RUN_DIR STAGE [torchrun's options]`.

It is torchrun, which ends all workers when one of them fails; only what it says of that is not a page of text but a
file with the workers' exit codes, and its own exit code is that of the first that failed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from alignctl.errors import EXIT_FAILED
from alignctl.run.files import write_json
from alignctl.run.paths import RunPaths
from alignctl.run.process import die_with_parent

_SHUTDOWN_TIMEOUT_S = 10  # from asking the other workers to end until they are killed


def main(run_dir: str, stage: str, *options: str) -> int:
    """Runs a stage's workers on this machine. Returns the exit code."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_TIMEOUT_S))
    args = parse_args([*options, "-m", "alignctl.worker", run_dir, stage])
    try:
        run(args)
        return 0
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        write_json(RunPaths(Path(run_dir)).stage(stage).exit_codes(args.node_rank), codes)
        first = error.get_first_failure()[1].exitcode
        return first if first > 0 else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
