"""Entry of the process that looks at the rows of stages before any is trained:
`python -m alignctl.beforehand FOLDER FILE MOST STAGE...`.

FOLDER has the plan of the run. What was found is written to FILE as JSON: the problems, or that a file has more than
MOST rows (0 for any number), so that nothing was looked at.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from alignctl.monitor.stopping import StopSignal
from alignctl.run.files import write_json
from alignctl.run.paths import RunPaths
from alignctl.run.process import die_with_parent


def main(folder: str, file: str, most: str, *names: str) -> int:
    """Looks at the rows of stages. Returns the exit code: 0, whatever is found."""
    die_with_parent()
    stop = StopSignal()
    import datasets

    from alignctl.beforehand.looking import has_more, look

    datasets.disable_progress_bars()
    paths = RunPaths(Path(folder))
    if int(most) and has_more(paths, names, int(most)):
        write_json(Path(file), {"too_many": True, "problems": []})
        return 0
    problems = [asdict(problem) | {"exit_code": code} for problem, code in look(paths, names, stop)]
    write_json(Path(file), {"too_many": False, "problems": problems})
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # library threads must not hold up the end
