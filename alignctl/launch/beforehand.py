"""Has a child look at the rows of all stages before the first of them trains (beforehand/). Torch-free.

A pipeline is then not refused at its reward model after hours of SFT. One stage alone reads its rows first anyway, and
where all but the last are short nothing is lost by waiting.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignctl.config.secrets import mask
from alignctl.config.trl_fields import config_fields
from alignctl.errors import AlignctlError, RequestError
from alignctl.launch.child import ChildFailed, as_error, ask
from alignctl.methods.registry import methods
from alignctl.monitor.heartbeat import progress, read_beats
from alignctl.plan.plan import RunPlan, StagePlan
from alignctl.run.files import read_json, write_json
from alignctl.run.paths import RunPaths, StagePaths
from alignctl.run.state import is_done, read_status, write_stage_state

SEEN_ON_SUBMIT = 100_000
"""Rows in a file up to which the command that submits looks at them; of more, the first job does."""
_LEAST_STEPS = 20  # of the stages before the last: as few as a stage takes without a rehearsal
_WAIT_POLL_S = 2.0  # of a file system that many machines share
_BEGINS_S = 600  # a child may take until it says what it does: it imports much


class Watcher(Protocol):
    """Whoever shows what happens."""

    def say(self, text: str) -> None:
        """Something people should know."""

    def progress(self, stage: StagePlan, progress: dict[str, Any]) -> None:
        """What is done for a stage now."""


def is_due(plan: RunPlan) -> bool:
    """Whether rows of a run are still to be looked at, before anything trains."""
    left = _left(plan)
    return (
        len(left) > 1
        and left[0].config.rehearse
        and sum(map(_steps_at_most, left[:-1])) >= _LEAST_STEPS
        and read_json(plan.paths.beforehand) != _known_by(plan)
    )


def look_beforehand(plan: RunPlan, watcher: Watcher, most: int = 0) -> None:
    """Lets a process without a GPU read and tokenise the rows of all stages that are left, as far as they are there.
    What it made is found by the stages.

    Args:
        plan: Of a run that is frozen.
        most: With files of more rows, and with rows that cannot be had, nothing is done here, for jobs do it; 0 for any
            number, and where there are none.

    Raises:
        RequestError: Stages would refuse their rows.
        AlignctlError: Rows cannot be had.
    """
    if not is_due(plan):
        return
    watcher.say("before the first stage, the rows of all stages are looked at")
    names = [stage.config.name for stage in _left(plan)]
    try:
        found = _answer(plan, {"stages": names, "most": most}, watcher)
    except ChildFailed as error:  # for another reason than the rows, which holds up no run
        failed = "the rows could not be looked at before the first stage, so each stage looks at its own"
        watcher.say(f"{failed}: {error.last_line}")
        found = {"problems": []}
    if found.get("too_many"):
        watcher.say(f"a file has more than {most:,} rows: the first job looks at them")
        return
    if problems := found["problems"]:
        if most and not any(problem["exit_code"] == RequestError.exit_code for problem in problems):
            watcher.say(f"rows cannot be had here, so the first job looks at them: {problems[0]['message']}")
            return
        raise _refused(plan, problems)
    for name, before in read_status(plan.paths)["stages"].items():
        if before["state"] == "failed" and not before.get("attempts"):  # it was refused here, and is not any more
            write_stage_state(plan.paths, name, "waiting", error=None)
    write_json(plan.paths.beforehand, _known_by(plan))


def preview_rows(plan: RunPlan, stages: Sequence[str], asked: dict[str, Any], watcher: Watcher) -> dict[str, Any]:
    """Rows of a stage as its trainer sees them (beforehand/shown.py).

    Args:
        stages: The stage, and before it those that it starts from, as far as they are not done.
        asked: Which rows: `row`, `worst`, `count`.

    Raises:
        RequestError: The stage would refuse its rows, or there are none like that.
        AlignctlError: They cannot be had.
    """
    try:
        found = _answer(plan, {"stages": list(stages), **asked}, watcher)
    except ChildFailed as error:
        raise AlignctlError(f"the process that reads the rows failed: {error.last_line}") from error
    if problems := found.pop("problems"):
        raise as_error(problems)
    return found


def wait_until_looked(plan: RunPlan, paths: StagePaths) -> bool:
    """Waits on another machine of a job until the first has looked; whether it goes on, and did not end by itself."""
    while is_due(plan):
        if paths.ended(0).exists():
            return False
        time.sleep(_WAIT_POLL_S)
    return True


def _answer(plan: RunPlan, asked: dict[str, Any], watcher: Watcher) -> dict[str, Any]:
    """What the child found.

    Raises:
        ChildFailed: It found nothing.
        AlignctlError: It did not get on.
    """
    seen: Any = None

    def look() -> None:
        nonlocal seen
        seen = _show(plan, asked["stages"], scratch, watcher, seen)
        patience.look()

    with tempfile.TemporaryDirectory(prefix="alignctl-rows-") as folder:
        scratch = RunPaths(Path(folder))
        write_json(scratch.plan, mask(plan.to_dict()))
        patience = _Patience(plan, [scratch.stage(name) for name in asked["stages"]])
        return ask("alignctl.beforehand", scratch.root, [folder, json.dumps(asked)], _environment(plan), look)


class _Patience:
    """How long a child may stand still: as long as the workers of its stages."""

    def __init__(self, plan: RunPlan, folders: Sequence[StagePaths]):
        self._folders, self._limit_s = folders, max(stage.config.launcher.stall_timeout for stage in plan.stages)
        self._said: list[Any] = []
        self._since = time.monotonic()

    def look(self) -> None:
        """Takes note of what has changed; to be called often.

        Raises:
            AlignctlError: Nothing has, for too long.
        """
        beats = [beat for folder in self._folders for beat in read_beats(folder.beats(0))]
        said, now = [progress(beat) for beat in beats], time.monotonic()
        if said != self._said:
            self._said, self._since = said, now
        elif now > self._since + (self._limit_s if beats else max(self._limit_s, _BEGINS_S)):
            doing = beats[-1]["doing"] if beats else "starting"
            raise AlignctlError(
                f"before training ({doing}) nothing got on for {self._limit_s} s",
                "a chat template that never ends does this: `model.chat_template` or that of the tokenizer; for slow "
                "files raise `launcher.stall_timeout`",
            )


def _environment(plan: RunPlan) -> dict[str, str]:
    """That of the workers; the Hub is reached where any of them may."""
    environment = dict(plan.stages[0].environment)
    if not all("HF_HUB_OFFLINE" in stage.environment for stage in plan.stages):
        environment.pop("HF_HUB_OFFLINE", None)
    return environment


def _show(plan: RunPlan, names: Sequence[str], scratch: RunPaths, watcher: Watcher, seen: Any) -> Any:
    """Shows what the child does now if that is not what was seen before; returns it."""
    for stage in reversed([stage for stage in plan.stages if stage.config.name in names]):
        folders = scratch.stage(stage.config.name)
        if progress := read_json(folders.progress):
            counts = next((beat["counts"] for beat in read_beats(folders.beats(0))), {})
            now = {"phase": f"before training: {progress['phase']}", "counts": counts}
            if now != seen:
                watcher.progress(stage, now)
            return now
    return seen


def _refused(plan: RunPlan, problems: Sequence[dict[str, Any]]) -> AlignctlError:
    """What to raise; the stages of which it is said have failed."""
    names = [stage.config.name for stage in plan.stages]
    for name in names:
        own = [problem["message"] for problem in problems if problem["message"].startswith(f"stage `{name}`: ")]
        if own:
            write_stage_state(plan.paths, name, "failed", error="\n".join(own))
    return as_error(problems)


def _left(plan: RunPlan) -> list[StagePlan]:
    """Stages that this run is still to do."""
    folders = {stage.config.name: plan.paths.stage(stage.config.name) for stage in plan.stages}
    return [
        stage
        for stage in plan.stages
        if not is_done(folders[stage.config.name]) and not folders[stage.config.name].root.is_symlink()
    ]


def _steps_at_most(stage: StagePlan) -> float:
    """Optimizer steps of a stage, as far as they are known without its rows."""
    given, fields = stage.config.trainer, config_fields(methods()[stage.config.method].config_class)
    steps, epochs = (
        float(given.get(key, fields[key].default if key in fields else missing) or 0)
        for key, missing in (("max_steps", 0), ("num_train_epochs", 1))
    )
    if steps > 0:
        return steps
    limit = stage.config.data.limit
    return math.inf if limit is None else limit * epochs / stage.global_batch_size


def _known_by(plan: RunPlan) -> dict[str, str]:
    return {stage.config.name: stage.fingerprint for stage in plan.stages}
