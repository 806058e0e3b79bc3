"""Writes a planned run to its directory, and finds runs written before. Torch-free; run/frozen.py reads them back."""

from __future__ import annotations

import glob
import itertools
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alignctl.config.flat import flatten
from alignctl.config.recipe_files import look_at
from alignctl.config.renamed import present_names
from alignctl.config.rewards import function_of
from alignctl.config.schema import FUNCTION_KEYS, PATHS, ROLE_KEYS, ZERO_STAGES, default_of
from alignctl.config.secrets import MASK, mask
from alignctl.data.templates import TEMPLATES, is_text
from alignctl.errors import LaunchError, RequestError, first_few
from alignctl.plan.deepspeed import deepspeed_config
from alignctl.plan.plan import RunPlan, StagePlan, stage_command, stage_environment
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, read_record, write_json, write_text
from alignctl.run.fingerprint import VERSION, counts, input_files
from alignctl.run.forms import PROVENANCE
from alignctl.run.frozen import as_stage, frozen_fingerprints, frozen_version, read_frozen
from alignctl.run.owner import is_others
from alignctl.run.paths import PLAN, RunPaths, StagePaths
from alignctl.run.provenance import collect_provenance
from alignctl.run.shares import kind_of, must_convert
from alignctl.run.state import is_done


def absolute_paths(config: Mapping[str, Any], stages: Sequence[str] = ()) -> dict[str, Any]:
    """Makes the paths of files and folders that exist here independent of the current folder.

    Args:
        stages: Names that mean a stage where a role's model is named, whatever folder is called so.
    """
    absolute, stages = dict(config), config.get("stages", stages)
    for key, node in config.items():
        if key in PATHS and isinstance(node, Mapping):
            names = [name for name in PATHS[key] if name in node and not _is_template(name, node[name])]
            paths = {name: _absolute(node[name]) for name in names}
            absolute[key] = dict(node) | paths
            if isinstance(node.get("eval"), Mapping):
                absolute[key]["eval"] = {name: _absolute(path) for name, path in node["eval"].items()}
            if isinstance(node.get("mix"), list):
                absolute[key]["mix"] = [
                    dict(one) | {"path": _absolute(one.get("path"))} if isinstance(one, Mapping) else one
                    for one in node["mix"]
                ]
        elif key in ROLE_KEYS and node not in stages:
            absolute[key] = _absolute(node)
        elif key in FUNCTION_KEYS:
            entries = [node] if isinstance(node, str | Mapping) else node or []
            absolute[key] = [_absolute_function(one) for one in entries]
        elif isinstance(node, Mapping):
            absolute[key] = absolute_paths(node, stages)
    return absolute


def new_run_dir(recipe: str, root: Path, suffix: str = "", make: bool = False) -> Path:
    """A folder that does not exist yet, named after the recipe and the time.

    Args:
        make: Makes it, so that no other command that starts in the same second takes it, too.
    """
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for count in itertools.count(1):
        folder = root / recipe / (stamp + (f"-{count}" if count > 1 else "") + suffix)
        if folder.exists():
            continue
        if not make:
            return folder
        with suppress(FileExistsError):
            RunPaths(folder).make_root(anew=True)
            return folder
    raise AssertionError("there is always another number")


def find_run(recipe: str, root: Path, fingerprints: Mapping[str, str], trusted: bool = False,
             say: Callable[[str], None] = lambda text: None) -> Path | None:  # fmt: skip
    """The newest run of a recipe that would do exactly the same, finished or not. They are numbered as they are begun:
    clocks can be wrong.

    Args:
        trusted: Whether runs count that others may have written.
        say: Is told of runs that cannot be read.
    """
    folders = [plan.parent for plan in (root / recipe).glob(f"*/{PLAN}")]
    runs = [RunPaths(folder) for folder in folders if trusted or not is_others(folder)]
    for paths in sorted(runs, key=lambda paths: (_number(paths), paths.root.name), reverse=True):
        try:
            if frozen_fingerprints(paths) == fingerprints:
                return paths.root
        except RequestError as error:
            say(f"{paths.root} is skipped: {error.problems[0].message}")
    return None


def _number(paths: RunPaths) -> int:
    """Of a run among those of its recipe; 0 where it has none."""
    plan = read_json(paths.plan)
    number = plan.get("number") if isinstance(plan, dict) else None
    return number if isinstance(number, int) else 0


def _next_number(paths: RunPaths) -> int:
    return 1 + max((_number(RunPaths(plan.parent)) for plan in paths.root.parent.glob(f"*/{PLAN}")), default=0)


def fingerprints(plan: RunPlan) -> dict[str, str]:
    """Stage names and their fingerprints, in order."""
    return {stage.config.name: stage.fingerprint for stage in plan.stages}


def freeze(plan: RunPlan, config: Mapping[str, Any], command: Sequence[str]) -> None:
    """Writes config.yaml, plan.json and provenance.json; secrets are masked, or stay variables of the environment."""
    paths = plan.paths
    paths.make_root()
    write_text(paths.config, OmegaConf.to_yaml(OmegaConf.create(mask(dict(config)))))
    earlier = read_record(paths.provenance, PROVENANCE) or []
    write_json(paths.provenance, [*earlier, collect_provenance(command)])
    stage = plan.stages[0].config
    deepspeed = deepspeed_config(stage.distributed, on_cpu=bool(stage.launcher.processes))
    if deepspeed is not None:
        write_json(paths.deepspeed, deepspeed)
    number = _number(paths) or (_next_number(paths) if paths.root.parent.name == plan.recipe else 0)
    write_json(paths.plan, mask(plan.to_dict()) | {"number": number})  # last: a directory with a plan is a run


def link_stages(plan: RunPlan, shared: Mapping[str, RunPaths]) -> None:
    """Gives a run the stages that another run does for it, as links, where it has none of its own."""
    for name, owner in shared.items():
        folder, other = plan.paths.stage(name).root, owner.stage(name).root
        if not folder.exists():
            other.mkdir(exist_ok=True)
            folder.symlink_to(os.path.relpath(other, folder.parent))


def refuse_anothers_stage(plan: RunPlan, name: str) -> None:
    """Leaves a stage that is not done to the run that does it for several.

    Raises:
        LaunchError: It is not this run's.
    """
    folder = plan.paths.stage(name).root
    if folder.is_symlink():
        owner = folder.resolve().parent
        raise LaunchError(
            f"stage `{name}` of {plan.run_dir} is done in {owner} for several runs, and is not finished",
            f"first `alignctl resume {shlex.quote(str(owner))}`; `alignctl status` says what it is doing",
        )


def read_plan(paths: RunPaths) -> RunPlan:
    """The plan of a run, as it was frozen. Of its stages it takes the settings: what is run is made of them anew, and
    not what the file says, which others may have written.

    Raises:
        RequestError: There is no run.
    """
    frozen = read_frozen(paths)
    facts = ("start", "roles", "trained", "global_batch_size", "output", "fingerprint")
    stages = []
    for stage in frozen["stages"]:
        config = as_stage(paths, stage["config"])
        with _damage_named(paths):
            command, environment = stage_command(config, paths.root), stage_environment(config)
        inputs = stage.get("inputs") or {}
        made = {"config": config, "command": command, "environment": environment, "inputs": inputs}
        stages.append(StagePlan(**made, **{fact: stage[fact] for fact in facts}))
    return RunPlan(frozen["recipe"], str(paths.root), tuple(stages))


@contextmanager
def _damage_named(paths: RunPaths) -> Iterator[None]:
    """Says of settings from which nothing can be made that they are damaged."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, OSError) as error:
        raise RequestError(
            f"{paths.plan} is damaged, or of another alignctl, or a file that it names cannot be read: {error}",
            "put it back as it was, or begin anew with another `run_dir`",
        ) from error


def refuse_moved(paths: RunPaths) -> None:
    """Keeps a run where it was frozen: its commands and the places of its models are written down.

    Raises:
        RequestError: It was moved, or is a copy.
    """
    then = read_frozen(paths)["run_dir"]
    if Path(then).resolve() != paths.root.resolve():
        raise RequestError(
            f"{paths.root} was begun as {then}",
            "move it back there, or give the whole command again with this `run_dir`",
        )


def refuse_other_version(paths: RunPaths) -> None:
    """Keeps a run to a code that means the same by its settings and can read its checkpoints.

    Raises:
        RequestError: It was begun under another version.
    """
    if paths.plan.exists() and (then := frozen_version(paths)) != VERSION:
        by = (read_record(paths.provenance, PROVENANCE) or [{}])[0].get("alignctl", "another version")
        raise RequestError(
            f"{paths.root} was begun by alignctl {by}, which makes other stages of the same settings (its plan.json "
            f"is of version {then}, and this alignctl writes version {VERSION})",
            "go on with the alignctl that began it, or begin another run: with `--new`, or another `run_dir`",
        )


def refuse_left_behind(plan: RunPlan, root: Path, config: Mapping[str, Any]) -> None:
    """Does not begin anew, without a word, what a run under another version has begun.

    Raises:
        RequestError: There is such a run of the same recipe and settings.
    """
    for file in (root / plan.recipe).glob(f"*/{PLAN}"):
        paths = RunPaths(file.parent)
        try:
            stages = [paths.stage(name) for name in frozen_fingerprints(paths)]
            older = frozen_version(paths) != VERSION
            left = older and any(map(_begun, stages)) and not _changes(paths, plan, config)
        except RequestError:  # it is damaged, and none that is named
            continue
        if left:
            refuse_other_version(paths)


def refuse_other_run(plan: RunPlan, config: Mapping[str, Any]) -> None:
    """Keeps a run directory to one run.

    Raises:
        RequestError: A stage in it was begun with other settings or inputs than this plan has for it, or it is not a
            run directory.
    """
    paths = plan.paths
    if not paths.plan.exists() and _other_things(paths):
        raise RequestError(f"{paths.root} holds other things than a run", "give another `run_dir`")
    frozen, planned = frozen_fingerprints(paths), fingerprints(plan)
    if any(_begun(paths.stage(name)) for name in frozen):
        refuse_other_version(paths)
    for name in frozen | planned:
        if _begun(paths.stage(name)) and frozen.get(name) != planned.get(name):
            then = next((stage.inputs for stage in read_plan(paths).stages if stage.config.name == name), {})
            now = next((stage.inputs for stage in plan.stages if stage.config.name == name), {})
            changes = [*_changes(paths, plan, config), *_changed_inputs(then, now)] or [
                "an input file is not the same, or this alignctl counts its settings otherwise"
            ]
            raise RequestError(
                f"{paths.root} holds a run whose stage `{name}` was begun otherwise: {'; '.join(changes)}",
                "give another `run_dir`, or remove this one",
            )


def refuse_other_inputs(plan: RunPlan) -> None:
    """Keeps a run that is continued as it was frozen to the files that it was frozen with.

    Raises:
        RequestError: One is another now, or gone.
    """
    for stage in plan.stages:
        paths = plan.paths.stage(stage.config.name)
        with _damage_named(plan.paths):
            changes = _changed_inputs(stage.inputs, input_files(stage.config.inputs))
        if changes and _begun(paths):
            raise RequestError(
                f"stage `{stage.config.name}` of {plan.run_dir} was begun otherwise: {'; '.join(changes)}",
                "put back what it was begun with, or give the whole command with another `run_dir`",
            )
        if changes:
            raise RequestError(
                f"since {plan.run_dir} was planned, inputs of stage `{stage.config.name}` have changed: "
                f"{'; '.join(changes)}",
                "put them back, or give the whole command again, which takes them as they are",
            )


def _changed_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Input files that are not what they were, as far as that was noted; the first few."""
    gone = [f"{file} is gone" for file in then if file not in now and not Path(file).exists()]
    other = [f"the content of {file} has changed" for file in then if file in now and now[file] != then[file]]
    new = [f"{file} is new" for file in now if file not in then and then]
    found = [*other, *gone, *new]
    return [first_few(found, "; ")] if found else []


def refuse_other_shares(plan: RunPlan) -> None:
    """Keeps a stage from continuing where it would lose the state of its optimizer without a word.

    Raises:
        RequestError: Its newest checkpoint was written by processes that shared it otherwise.
    """
    for stage in plan.stages:
        checkpoint = newest_checkpoint(plan.paths.stage(stage.config.name).checkpoints)
        if checkpoint and not is_done(plan.paths.stage(stage.config.name)):
            kind = stage.config.distributed.type
            zero_stage = ZERO_STAGES.get(kind, 0)
            must_convert(checkpoint, kind_of(stage.config.launcher.world_size, zero_stage, kind == "fsdp2"))


def _other_things(paths: RunPaths) -> bool:
    """Whether a folder without a plan holds more than a command leaves that was killed before it wrote one."""
    ours = (paths.config, paths.provenance)
    folder = paths.root.iterdir() if paths.root.is_dir() else ()
    return any(file not in ours and not file.name.startswith(".") for file in folder)


def _begun(stage: StagePaths) -> bool:
    """Whether a stage has anything that other settings would spoil."""
    there = stage.result, stage.evaluation_before, stage.drawn(0)
    return any(file.exists() for file in there) or newest_checkpoint(stage.checkpoints) is not None


def _changes(paths: RunPaths, plan: RunPlan, config: Mapping[str, Any]) -> list[str]:
    """Settings that count and differ from the frozen ones, `key: then -> now`; not one that was masked."""
    look_at(paths.config)
    then = flatten(present_names(OmegaConf.to_container(OmegaConf.load(paths.config))))
    now = flatten(mask(dict(config)))
    keys = [key for key in sorted(then.keys() | now.keys()) if counts(key)]
    both = [(key, *(given.get(key, default_of(key)) for given in (then, now))) for key in keys]
    batches = {stage["config"]["name"]: stage["global_batch_size"] for stage in read_frozen(paths)["stages"]}
    for stage in plan.stages:
        name, batch = stage.config.name, stage.global_batch_size
        both.append((f"{name}.global_batch_size", batches.get(name, batch), batch))
    return [f"`{key}`: {old} -> {new}" for key, old, new in both if old != new and MASK not in str(old)]


def _is_template(key: str, given: Any) -> bool:
    """Whether a setting is a chat template by name, or its text: no path, whatever file is called so."""
    return key == "chat_template" and isinstance(given, str) and (given in TEMPLATES or is_text(given))


def _absolute_function(entry: Any) -> Any:
    """An entry of `reward_funcs`: the file of its function, if it names one."""
    target = function_of(entry)
    place, mark, name = (target or "").rpartition(":")
    if not place.endswith(".py"):
        return entry
    absolute = f"{_absolute(place)}{mark}{name}"
    return absolute if isinstance(entry, str) else dict(entry) | {"function": absolute}


def _absolute(value: Any) -> Any:
    """A path, or each of several, or a pattern of paths."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if not isinstance(value, str):
        return value
    place = Path(value).expanduser()
    if place.exists():
        return str(place.resolve())
    return str(place.absolute()) if glob.has_magic(value) and glob.glob(str(place), recursive=True) else value
