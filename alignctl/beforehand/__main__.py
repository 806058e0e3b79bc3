"""Entry of the process that looks at the rows of stages before any is trained:
`python -m alignctl.beforehand FILE FOLDER ASKED`.

FOLDER has the plan of a run; ASKED is what is wanted, as JSON: `{"stages": [...], "most": N}` to make the rows of
stages ready unless a file has more than N (0 for any number), or `{"stages": [...], "row": ..., "worst": ..., "count":
...}` to show some rows of the last of them. What was found is written to FILE as JSON, problems that a user can mend,
too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from alignctl.config.secrets import masked_output
from alignctl.errors import AlignctlError
from alignctl.monitor.stopping import StopSignal
from alignctl.run.files import write_json
from alignctl.run.paths import RunPaths
from alignctl.run.process import die_with_parent


def main(file: str, folder: str, asked: str) -> int:
    """Does what is asked. Returns the exit code: 0, whatever is found."""
    die_with_parent()
    stop = StopSignal()
    import datasets

    datasets.disable_progress_bars()
    write_json(Path(file), _answer(RunPaths(Path(folder)), stop, **json.loads(asked)))
    return 0


def _answer(paths: RunPaths, stop: StopSignal, stages: list[str], **asked: Any) -> dict[str, Any]:
    from alignctl.beforehand.looking import Line, has_more, look
    from alignctl.beforehand.shown import Asked, preview

    if "most" in asked:
        if asked["most"] and has_more(paths, stages, asked["most"]):
            return {"too_many": True, "problems": []}
        return {"problems": look(paths, stages, stop)}
    *before, name = stages
    line = Line(paths, stop)
    try:
        for other in before:
            line.ready(other)
        return preview(line, name, Asked(**asked)) | {"problems": []}
    except AlignctlError as error:
        return {"problems": error.told()}


if __name__ == "__main__":
    with masked_output():
        code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # library threads must not hold up the end
