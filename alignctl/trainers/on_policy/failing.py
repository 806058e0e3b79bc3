"""What is said where scores end a stage: what to look at, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignctl.errors import AlignctlError
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.paths import StagePaths


@contextmanager
def scores_explained(output_dir: str) -> Iterator[None]:
    """Adds to an error of the scoring what its trainer knows.

    Raises:
        AlignctlError: As it was, with a hint.
    """
    try:
        yield
    except AlignctlError as error:
        (problem,) = error.problems
        newest = newest_checkpoint(Path(output_dir))
        where = f"the last checkpoint is {newest.path}" if newest else "there is no checkpoint yet"
        look = problem.hint or f"look at {StagePaths(Path(output_dir).parent).samples_while_training.name}"
        raise AlignctlError(problem.message, f"{look}; {where}") from error
