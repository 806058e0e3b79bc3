"""Checks of what scores completions. Torch-free."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from string import Formatter
from typing import Any
from urllib.parse import parse_qs, urlsplit

from alignctl.checks.code import check_function
from alignctl.checks.values import check_value, method_of
from alignctl.config.rewards import KINDS, READY, given_in, kinds_of, longest_wait_s, read_entry
from alignctl.config.schema import LauncherSettings
from alignctl.config.secrets import is_secret
from alignctl.config.stages import stage_launcher
from alignctl.config.suggest import closest, did_you_mean
from alignctl.config.trl_fields import config_fields
from alignctl.errors import Problem

_RESERVED = {"reward_model", "score"}
_USED_BY = {
    "reward_workers": ({"function", *READY}, "function"),
    "reward_timeout": (set(KINDS), "function, server or judge"),
    "reward_retries": ({"url", "judge"}, "server or judge"),
}


def check_rewards(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether something scores, and whether it can be asked."""
    stage, method = config[name], method_of(config, name)
    fields_of = config_fields(method.config_class) if method else {}
    if "reward_funcs" not in fields_of:
        return
    given = stage.get("reward_funcs") or []
    entries = given if isinstance(given, list) else [given]
    if not all(isinstance(entry, str | Mapping) for entry in entries):
        return  # reported with its type
    if not stage.get("reward_model") and not entries:
        yield Problem(
            f"`{name}` needs something that scores completions",
            f"set `{name}.reward_model` to a stage, a folder or a Hub id, or `{name}.reward_funcs=[module:function]`",
        )
    problems = {number: list(_entry(f"{name}.reward_funcs", entry)) for number, entry in enumerate(entries)}
    for found in problems.values():
        yield from found
    weights, sources = stage.get("reward_weights"), len(entries) + bool(stage.get("reward_model"))
    if isinstance(weights, list) and len(weights) != sources:
        yield Problem(f"`{name}.reward_weights` has {len(weights)} values for {sources} sources of rewards")
    if stage.get("normalize_rewards") == "statistics" and not stage.get("reward_model"):
        yield Problem(
            f"`{name}.normalize_rewards=statistics` needs a reward model", f"set `{name}.normalize_rewards=running`"
        )
    labels = [read_entry(entry).label for number, entry in enumerate(entries) if not problems[number]]
    if len(set(labels)) < len(labels) or _RESERVED & set(labels):
        yield Problem(
            f"`{name}.reward_funcs`: each function is logged under its name, which must be its own and not "
            f"`reward_model` or `score`; got {', '.join(labels)}",
            "name one of them otherwise, `{function: module:function, name: other}`",
        )
    kinds = {kind for entry in entries for kind in kinds_of(entry)}
    for key, (users, what) in _USED_BY.items():
        if key in stage and not kinds & users:
            yield Problem(f"`{name}.{key}` would have no effect: no {what} scores", f"take `{name}.{key}` out")
    if kinds & _USED_BY["reward_retries"][0]:
        yield from _patience(config, name, {key: field.default for key, field in fields_of.items()} | dict(stage))


def _patience(config: Mapping[str, Any], name: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether a run that waits for a server would count as stuck meanwhile."""
    timeout_s, retries = given["reward_timeout"], given["reward_retries"]
    stall_s = stage_launcher(config, name).get("stall_timeout", LauncherSettings.stall_timeout)
    if not all(isinstance(one, int | float) for one in (timeout_s, retries, stall_s)) or retries < 0:
        return  # reported with its type and bounds
    longest_s = longest_wait_s(timeout_s, int(retries))
    if longest_s >= stall_s:
        yield Problem(
            f"`{name}.reward_timeout={timeout_s:g}` and `{name}.reward_retries={retries}` let a server take "
            f"{longest_s:.0f} s, and after `launcher.stall_timeout={stall_s}` s the run would count as stuck",
            f"set `launcher.stall_timeout={2 * int(longest_s)}`, or lower one of them",
        )


def _entry(where: str, entry: str | Mapping[str, Any]) -> Iterator[Problem]:
    """One entry of `reward_funcs`."""
    kinds = kinds_of(entry)
    if len(kinds) != 1:
        yield _of_no_kind(where, entry, kinds)
        return
    (kind,), given = kinds, given_in(entry)
    known = {field.name: field for field in fields(KINDS[kind])}
    at = f"{where}: {kind}"
    wrong = [key for key in given if key not in known]
    for key in wrong:
        yield Problem(f"unknown key `{key}` of `{at}`", did_you_mean(key, known))
    for key, field in known.items():
        if key in given:
            found = list(check_value(f"{at}.{key}" if key != kind else at, given[key], str(field.type)))
            wrong += found
            yield from found
        elif field.default is MISSING:
            wrong.append(key)
            others = ", ".join(f"{one}: ..." for one in dict.fromkeys((kind, key)))
            yield Problem(f"`{at}` needs `{key}`", f"write `{{{others}}}`")
    if not wrong:
        yield from _CHECKS.get(kind, lambda where, given: ())(where, given)


def _of_no_kind(where: str, entry: Mapping[str, Any], kinds: list[str]) -> Problem:
    """What is said of an entry that is none, or several."""
    if kinds:
        return Problem(f"`{where}`: `{kinds[0]}` and `{kinds[1]}` are two entries", "begin another one with each")
    return Problem(
        f"`{where}`: nothing says what `{dict(entry)}` is",
        f"one of its keys is {', '.join(f'`{kind}`' for kind in KINDS)}",
    )


def _function(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    target = given["function"]
    place, _, function = target.rpartition(":")
    if not place or not function:
        near = closest(target, READY, 1)
        ready = f"did you mean `{near[0]}`?" if near else f"ready ones are {', '.join(f'`{one}`' for one in READY)}"
        yield Problem(
            f"`{where}`: `{target}` is no `module:function` or `file.py:function`, no URL and no ready function", ready
        )
    else:
        yield from check_function(where, target)


def _server(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    address = given.get("url", given.get("judge"))
    try:
        url = urlsplit(address)
    except ValueError:  # a bracket of an address that does not end
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.hostname:
        yield Problem(f"`{where}`: `{address}` is no URL of a server", "begin it with `http://` or `https://`")
    elif url.username or url.password or any(map(is_secret, parse_qs(url.query))):
        yield Problem(
            f"`{where}` has a password or a key in the URL of {url.hostname}, which would be written to disk",
            "put a key in the environment, and its variable's name in the entry: `key_from: MY_KEY`",
        )
    key = given.get("key_from")
    if key and not os.environ.get(key, "").strip():
        yield Problem(f"`{where}`: the environment has no key in the variable `{key}`", f"export {key}=...")


def _judge(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _server(where, given)
    try:
        list(Formatter().parse(given.get("question", "")))
    except ValueError as error:
        yield Problem(
            f"`{where}`: the `question` of the judge cannot be filled in: {error}", "write `{{` and `}}` for braces"
        )


def _format(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        re.compile(given["format"])
    except re.error as error:
        yield Problem(f"`{where}`: `{given['format']}` is no regular expression: {error}")


def _boxed_math(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    if importlib.util.find_spec("math_verify") is None:
        yield Problem(f"`{where}`: `boxed_math` needs the package `math-verify`", 'pip install "alignctl[maths]"')


def _length_penalty(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    if not 0 < given["buffer"] <= given["length_penalty"]:
        yield Problem(
            f"`{where}`: the `buffer` of `length_penalty: {given['length_penalty']}` must be from 1 to as many tokens, "
            f"got `{given['buffer']}`"
        )


def _repetition(where: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    if given.get("repetition", 1) < 1:
        yield Problem(f"`{where}`: `repetition` must be 1 word or more, got `{given['repetition']}`")


_CHECKS = {
    "function": _function,
    "url": _server,
    "judge": _judge,
    "format": _format,
    "boxed_math": _boxed_math,
    "length_penalty": _length_penalty,
    "repetition": _repetition,
}
