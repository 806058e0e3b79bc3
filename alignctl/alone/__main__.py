"""Entry of the process that rehearses a stage as one of many: `python -m alignctl.alone FILE RUN_DIR STAGE TOKENS
numbers|numberless`.

Which process of how many it is comes from the environment, as torchrun would set it. What was seen is written to FILE
as JSON, problems that a user can mend, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from alignctl.config.secrets import masked_output
from alignctl.errors import AlignctlError
from alignctl.run.files import write_json
from alignctl.run.frozen import read_stage
from alignctl.run.paths import RunPaths
from alignctl.run.process import die_with_parent


def main(file: str, run_dir: str, stage_name: str, tokens: str, numberless: str) -> int:
    """Rehearses a stage of a frozen run. Returns the exit code: 0, whatever is seen."""
    die_with_parent()
    paths = RunPaths(Path(run_dir))
    stage, _ = read_stage(paths, stage_name)
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from alignctl.alone.rehearsal import rehearse

    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        seen = rehearse(stage, paths.stage(stage_name), int(tokens), numberless == "numberless")
    except AlignctlError as error:
        seen = {"problems": error.told()}
    write_json(Path(file), seen)
    return 0


if __name__ == "__main__":
    with masked_output():
        code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # library threads must not hold up the end
