"""No stage can be called like a file of the run directory."""

from pathlib import Path

from alignctl.config.schema import RESERVED_NAMES
from alignctl.run.paths import RunPaths


def test_files_of_the_run_are_reserved():
    paths = RunPaths(Path("/run"))
    files = [getattr(paths, name) for name in ("config", "plan", "provenance", "status", "trackers")]
    files += [paths.tensorboard, paths.mlruns, paths.trackio]
    assert {file.stem for file in files} <= set(RESERVED_NAMES)
