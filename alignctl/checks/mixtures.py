"""Checks of `data.mix`: the entries, and what else says which rows are read. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.values import check_value
from alignctl.config.schema import MISSING, annotations
from alignctl.config.stages import merged_section
from alignctl.config.suggest import did_you_mean
from alignctl.data.settings import MixedSource
from alignctl.errors import Problem

_HAND = "`[{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]`"
_ONLY_OF_MIX = ("mix_by", "mix_stopping_strategy")


def entries_of(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a mixture, as far as they are any; others are reported with their type."""
    mix = data.get("mix")
    return [entry for entry in mix if isinstance(entry, Mapping)] if isinstance(mix, list) else []


def check_mix(config: Mapping[str, Any], name: str, where: str) -> Iterator[Problem]:
    """Whether the mixture of a stage says what is to be mixed, and nothing else says so, too.

    Args:
        where: The section of its rows.
    """
    data = merged_section(config, name, "data")
    if data.get("mix") is None:
        for key in _ONLY_OF_MIX:
            if key in data:
                yield Problem(f"`{where}.{key}` would have no effect: there is no `{where}.mix`", "take it out")
        return
    if not (entries := entries_of(data)):
        if data["mix"] == []:
            yield Problem(f"`{where}.mix` is empty: there is nothing to mix", f"give sources: {_HAND}")
        return
    for key, value in (("path", data.get("path")), ("eval_split", data.get("eval_split"))):
        if value not in (None, MISSING):
            hint = f"set `{where}.{key}=null`" + ("" if key == "path" else ", and give `eval_path` or `eval_rows`")
            yield Problem(f"`{where}.mix` and `{where}.{key}={value}` exclude each other", hint)
    known = annotations(MixedSource)
    for number, entry in enumerate(entries):
        of = f"{where}.mix[{number}]"
        for key, value in entry.items():
            if key not in known:
                yield Problem(f"unknown key `{of}.{key}`", did_you_mean(key, known))
            else:
                yield from check_value(f"{of}.{key}", value, known[key])
        if "path" not in entry:
            yield Problem(f"`{of}` has no `path`", f"a mixture is {_HAND}")
    weights = [entry.get("weight") for entry in entries]
    if None in weights and any(weight is not None for weight in weights):
        which = weights.index(None)
        yield Problem(f"`{where}.mix[{which}]` has no `weight`, and others have one", "give each one, or none")
    elif None in weights and "mix_stopping_strategy" in data:
        yield Problem(
            f"`{where}.mix_stopping_strategy` would have no effect: without weights every row is there once",
            "give each entry a `weight`, or take it out",
        )
    model = merged_section(config, name, "model")
    trains_tokenizer = model.get("scratch") and not model.get("tokenizer") and config[name].get("from") is None
    if data.get("mix_by") == "tokens" and trains_tokenizer:
        yield Problem(
            f"`{where}.mix_by=tokens` needs a tokenizer, and that of `{name}` is trained on the mixed rows",
            f"mix by rows, or give `{name}.model.tokenizer=...`",
        )
