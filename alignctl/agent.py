"""Entry of the process that starts a machine's workers: `python -m alignctl.agent RUN_DIR STAGE [torchrun's options]`.

It is torchrun, which ends all workers when one of them fails; only what it says of that is not a page of text but a
file with the exit codes of those that failed by themselves, and its own exit code is that of the first. Requests to
stop are the workers' affair: it leaves with them.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from alignctl.config.secrets import masked_output
from alignctl.errors import EXIT_FAILED
from alignctl.monitor.stopping import STOPPING, handle
from alignctl.run.files import leave_json
from alignctl.run.paths import RunPaths
from alignctl.run.process import PARENT, die_with_parent

_IGNORED = [number for number in STOPPING if number != signal.SIGHUP]  # workers would take that as one under nohup
_SHUTDOWN_TIMEOUT_S = 10  # from asking the other workers to end until they are killed


def main(run_dir: str, stage: str, *options: str) -> int:
    """Runs a stage's workers on this machine. Returns the exit code."""
    die_with_parent()
    handle(lambda *_: None)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.environ[PARENT] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from alignctl.rendezvous import interface_towards, offer

    offer()
    ours = ["--signals-to-handle=SIGQUIT", "--rdzv-backend=alignctl"]
    args = parse_args([*ours, *options, "-m", "alignctl.worker", run_dir, stage])
    args.rdzv_conf = f"rank={args.node_rank}"
    interface = interface_towards(args.rdzv_endpoint.rpartition(":")[0])
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it goes by what the machine calls itself
    _note_who_fails(RunPaths(Path(run_dir)).stage(stage).exit_codes(args.node_rank))
    try:
        run(args)
        return 0
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        first = error.get_first_failure()[1].exitcode
        return first if first > 0 else EXIT_FAILED


def _note_who_fails(file: Path) -> None:
    """Has torchrun write down which workers have failed before it ends the others: afterwards it cannot tell those that
    it killed from those that failed. It also gives them less time than its own 30 s, which no option changes."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close = SubprocessContext._close

    def note_and_close(self: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
        failed: dict[str, Any] = {self.envs[i]["RANK"]: failure.exitcode for i, failure in self._failures.items()}
        if failed and not file.exists():
            leave_json(file, failed)
        close(self, death_sig, min(timeout, _SHUTDOWN_TIMEOUT_S))

    SubprocessContext._close = note_and_close


if __name__ == "__main__":
    with masked_output():
        code = main(*sys.argv[1:])
    sys.exit(code)
