"""Checks of what the section `launcher` says to SLURM; SLURM itself is asked when jobs are submitted. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.values import check_value
from alignctl.config.schema import NOT_ON_SLURM, ONLY_ON_SLURM, LauncherSettings, annotations
from alignctl.config.suggest import did_you_mean
from alignctl.errors import Problem

_TIME = re.compile(
    r"(?:(?P<days>\d+)-)?(?:(?P<a>\d+)(?::(?P<b>\d+)(?::(?P<c>\d+))?)?)", re.ASCII
)  # MINUTES, MINUTES:SECONDS, H:M:S, D-H, D-H:M, D-H:M:S
# Options of sbatch that follow from other settings, and from which.
_OWNED = {
    "--account": "launcher.account", "-A": "launcher.account", "--array": "a sweep", "-a": "a sweep",
    "--clusters": "where you submit", "-M": "where you submit", "--gpus": "launcher.gpus_per_node",
    "-G": "launcher.gpus_per_node", "--wait": "submitting", "-W": "submitting",
    "--cpus-per-task": "launcher.cpus_per_process", "-c": "launcher.cpus_per_process", "--dependency": "stages",
    "-d": "stages", "--error": "run_dir", "-e": "run_dir", "--gpus-per-node": "launcher.gpus_per_node",
    "--gres": "launcher.gpus_per_node", "--hold": "submitting", "-H": "submitting", "--job-name": "launcher.job_name",
    "-J": "launcher.job_name", "--kill-on-invalid-dep": "stages", "--mem": "launcher.mem",
    "--no-requeue": "launcher.max_requeues", "--nodes": "launcher.nodes", "-N": "launcher.nodes",
    "--ntasks": "launcher.nodes", "-n": "launcher.nodes", "--ntasks-per-node": "launcher.nodes",
    "--open-mode": "run_dir", "--output": "run_dir", "-o": "run_dir", "--parsable": "submitting",
    "--partition": "launcher.partition", "-p": "launcher.partition", "--qos": "launcher.qos", "-q": "launcher.qos",
    "--requeue": "launcher.max_requeues", "--signal": "launcher.signal_seconds", "--test-only": "--dry-run",
    "--time": "launcher.time", "-t": "launcher.time", "--wrap": "the stages",
}  # fmt: skip
# Options of sbatch that are settings, too; `extra` took them before there were any.
_ALSO = {"--constraint": "constraint", "-C": "constraint", "--nodelist": "nodelist", "-w": "nodelist"}


def check_slurm(launcher: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Whether the settings of one stage's launcher mean something together.

    Args:
        where: Their key, `launcher` or `launcher.stages.STAGE`.
    """
    if launcher.get("type", "local") != "slurm":
        defaults = LauncherSettings()
        for key in ONLY_ON_SLURM:
            if key in launcher and launcher[key] != getattr(defaults, key):
                yield Problem(f"`{where}.{key}` would have no effect: only SLURM knows it", "add `launcher=slurm`")
        return
    for key, reason in NOT_ON_SLURM.items():
        if launcher.get(key):
            yield Problem(f"`{where}.{key}` is not to be set with `launcher=slurm`: {reason}", f"take `{key}` out")
    if not (launcher.get("gpus_per_node") or launcher.get("processes")):
        yield Problem(
            f"`{where}` does not say what a job needs",
            "set `launcher.gpus_per_node=8`, for example, or `launcher.processes=2` for machines without GPUs",
        )
    yield from _time(launcher, where)
    for option in _texts(launcher.get("extra")):
        yield from _extra(option, where)
        name = option.partition("=")[0]
        if launcher.get(key := _ALSO.get(name) or _ALSO.get(name[:2], "")):
            yield Problem(f"`{where}.extra`: `{option}` stands beside `{where}.{key}`", "take one of them out")
    for key in ("extra", "srun"):
        for option in _texts(launcher.get(key)):
            if not option.startswith("-"):
                yield Problem(
                    f"`{where}.{key}`: `{option}` is not an option", "write each as one word, `--exclude=node7`"
                )


def check_stage_launchers(launcher: Mapping[str, Any], stages: list[str]) -> Iterator[Problem]:
    """Names, keys and types of `launcher.stages`."""
    given = launcher.get("stages")
    known = {key: kind for key, kind in annotations(LauncherSettings).items() if key not in ("type", "stages")}
    for stage, settings in given.items() if isinstance(given, Mapping) else ():
        where = f"launcher.stages.{stage}"
        if stage not in stages:
            yield Problem(f"`{where}`: no stage that runs is called so", did_you_mean(stage, stages))
        elif not isinstance(settings, Mapping):
            yield Problem(f"`{where}` must be a mapping, got `{settings}`")
        else:
            for key, value in settings.items():
                if key not in known:
                    yield Problem(f"unknown key `{where}.{key}`", did_you_mean(key, known, prefix=f"{where}."))
                else:
                    yield from check_value(f"{where}.{key}", value, known[key])


def _time(launcher: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Whether the limit of a job can be read, and leaves time for work before it is told to save."""
    given = launcher.get("time")
    if isinstance(given, int):  # YAML reads 4:00:00 as a number
        hint = f"""for minutes `'launcher.time="{given}"'`; in a file `"04:00:00"`, with quotes"""
        yield Problem(f"`{where}.time` is the number {given}, and has to be text", hint)
    if not isinstance(given, str) or given.upper() in ("0", "UNLIMITED", "INFINITE"):
        return  # none, or reported with its type
    limit, before = limit_seconds(given), launcher.get("signal_seconds", LauncherSettings.signal_seconds)
    if limit is None:
        yield Problem(f"`{where}.time={given}` is not a time", 'write `HH:MM:SS`, `D-HH:MM:SS` or minutes: "08:00:00"')
    elif isinstance(before, int) and before >= limit:
        yield Problem(
            f"`{where}.signal_seconds={before}` is no less than the limit `{given}`: a job would save before it works",
            "give it more time, or set `launcher.signal_seconds` to a step and a save",
        )


def limit_seconds(text: str) -> int | None:
    """A time as sbatch takes it, in seconds; None where it is none."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    days, *parts = (int(part) if part else None for part in found.group("days", "a", "b", "c"))
    first, second, third = (part or 0 for part in parts)
    if days is not None or parts[2] is not None:
        return (days or 0) * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second


def _extra(option: str, where: str) -> Iterator[Problem]:
    """Whether an option of sbatch is the user's to give."""
    name = option.partition("=")[0]
    begun = [known for known in _OWNED if known.startswith(name)] if name.startswith("--") else []  # sbatch takes those
    if owner := _OWNED.get(begun[0] if begun else name[:2]):
        yield Problem(f"`{where}.extra`: `{option}` is not to be given: it follows from {owner}", "take it out")


def _texts(given: Any) -> list[str]:
    return [item for item in given if isinstance(item, str)] if isinstance(given, list) else []
