"""Checks of rows that one stage makes and another reads. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignctl.checks.order import not_before
from alignctl.checks.values import method_of
from alignctl.config.schema import MISSING
from alignctl.config.stages import merged_section, stage_names
from alignctl.data.formats import KINDS, accepted_kinds
from alignctl.errors import Problem

# Keys of `data` that say where rows are found outside the run, or what they are.
_OF_A_SOURCE = ("path", "mix", "name", "revision", "split", "eval_split", "holds")


def check_rows_from(config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Whether the rows that `data.from` of a stage names are made before it, and are what its method learns from."""
    data, own = merged_section(config, name, "data"), config[name].get("data")
    source = data.get("from")
    if not isinstance(source, str):
        return  # nothing, or reported with its type
    section = f"{name}.data" if isinstance(own, Mapping) and own.get("from") is not None else "data"
    others = [key for key in _OF_A_SOURCE if data.get(key) not in (None, MISSING)]
    if others:
        keys = ", ".join(f"`{section}.{key}`" for key in others)
        yield Problem(
            f"`{section}.from` and {keys} exclude each other: the rows are those that `{source}` makes",
            f"take {keys} out, or set `{section}.from=null`",
        )
    yield from _source(config, name, f"{section}.from={source}", source, data.get("use"))


def _source(config: Mapping[str, Any], name: str, where: str, source: str, use: Any) -> Iterator[Problem]:
    """Whether a stage is there, comes before the one that reads its rows, and makes rows that do."""
    stages = [stage for stage in config["stages"] if isinstance(stage, str)]  # others are reported with their type
    taker = method_of(config, name)
    giver = method_of(config, source) if source in stage_names(config) else None
    if source == name:
        yield Problem(f"`{where}`: a stage cannot read the rows that it makes")
    elif problem := not_before(where, name, stages, f"name rows with `{name}.data.path=...`"):
        yield problem
    elif giver and giver.product != "rows":
        yield Problem(
            f"`{where}`, but `{source}` makes a model and no rows", f"to start from it: `{name}.from={source}`"
        )
    elif giver and giver.makes and taker and giver.makes not in accepted_kinds(taker.data_kind, use):
        yield Problem(
            f"`{where}`: these rows are {giver.makes} ({KINDS[giver.makes]}), and the method `{taker.name}` needs "
            f"{taker.data_kind} ({KINDS[taker.data_kind]})",
            f"choose other data, or another method for `{name}`",
        )
