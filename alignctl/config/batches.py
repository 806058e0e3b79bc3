"""The global batch of a stage, what an optimizer step takes on all processes: as it follows from other settings, or
given, so that one of these follows from it. Torch-free, pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignctl.config.schema import LauncherSettings
from alignctl.config.stages import stage_launcher, stage_names
from alignctl.config.trl_fields import Field, config_fields
from alignctl.methods.registry import Method, methods

GLOBAL, PER_DEVICE, ACCUMULATION = "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"
_GROUP, _PARTS = "num_generations", "num_mini_batches"


@dataclass(frozen=True)
class Batch:
    """What an optimizer step of a stage takes: rows, pairs of preferences, or completions."""

    rows: int
    """As the settings of the stage have it."""
    wanted: int | None
    """As `global_batch_size` has it."""
    where: str
    """The setting that says so."""
    processes: int
    unit: int
    """Rows that all processes take together at once, of which a batch is a multiple: a batch of each, or of completions
    a group of each."""
    follows: str
    """The field of the stage that follows from a global batch: accumulation; or of a method that draws completions,
    which accumulates nothing, how many each process draws."""
    per_unit: int
    """The field, where the batch is as small as it can be."""

    def __str__(self) -> str:
        return f"{self.rows:,} {self.what} per optimizer step"

    @property
    def what(self) -> str:
        """Of what it has so many."""
        return "completions" if self.follows == PER_DEVICE else "rows"

    @property
    def divides(self) -> bool:
        return self.wanted is not None and self.wanted % self.unit == 0

    @property
    def following(self) -> int:
        """The field, where it makes the batch that is wanted."""
        assert self.wanted is not None
        return self.wanted // self.unit * self.per_unit

    def smaller_part(self, rows: int) -> int | None:
        """The largest batch of a process, not above what it is, that makes a global batch of so many rows; None where
        none does, or the batch of a process is what follows."""
        of_each, left = divmod(rows, self.processes)
        if left or not of_each or self.follows == PER_DEVICE:
            return None
        return next(size for size in range(self.unit // self.processes, 0, -1) if of_each % size == 0)


def batch_of(config: Mapping[str, Any], name: str) -> Batch | None:
    """The batch of a stage of a composed config; None where it has none, or what it follows from are no numbers, which
    checks/ report."""
    stage = config[name]
    method = methods().get(stage["method"]) if isinstance(stage["method"], str) else None
    fields = config_fields(method.config_class) if method else {}
    if method is None or GLOBAL not in fields:
        return None
    launcher = stage_launcher(config, name)
    counts = {key: launcher[key] for key in ("nodes", "gpus_per_node", "processes") if launcher.get(key) is not None}
    size, group, parts = (_number(stage, fields, key) for key in (PER_DEVICE, _GROUP, _PARTS))
    sizes = [size, group, parts, _number(stage, fields, ACCUMULATION)]
    wanted, where = stage.get(GLOBAL, config.get(GLOBAL)), f"{name}.{GLOBAL}" if GLOBAL in stage else GLOBAL
    if not all(map(_is_count, [*counts.values(), *sizes, 1 if wanted is None else wanted])):
        return None
    processes = LauncherSettings(**counts).world_size
    draws = _draws(method)
    return Batch(
        rows=rows_of_step(stage, fields, processes),
        wanted=wanted,
        where=where,
        processes=processes,
        unit=processes * (group if draws else size),
        follows=PER_DEVICE if draws else ACCUMULATION,
        per_unit=group * parts if draws else 1,
    )


def with_batches(config: Mapping[str, Any]) -> dict[str, Any]:
    """A composed config for other processes, in which follows what follows from global batches."""
    batches = {name: batch_of(config, name) for name in stage_names(config)}
    return dict(config) | {
        name: dict(config[name]) | {batch.follows: batch.following}
        for name, batch in batches.items()
        if batch and batch.divides
    }


Layers = Sequence[Mapping[str, str]]
"""Dotted keys that each of the files gives that are composed, in order, and the command line."""


def settle(config: dict[str, Any], layers: Callable[[], Layers]) -> None:
    """Has follow what follows from global batches, and takes out for which batch a learning rate was published where
    another rate is set later."""
    batches = {name: batch for name in stage_names(config) if (batch := batch_of(config, name))}
    if not any(batch.wanted or config[name].get("batch_for") for name, batch in batches.items()):
        return
    given = layers()
    for name in batches:
        if _last(given, f"{name}.learning_rate") > _last(given, f"{name}.batch_for"):
            config[name].pop("batch_for", None)
    for name, batch in settled(config, given).items():
        config[name][batch.follows] = batch.following


def settled(config: Mapping[str, Any], layers: Layers) -> dict[str, Batch]:
    """Global batches by stage, of those from which something follows: it is not given where the batch is or after it,
    but by a file that knows nothing of it, if at all."""

    def follows(name: str, batch: Batch) -> bool:
        given = _last(layers, f"{name}.{batch.follows}") if batch.follows in config[name] else -1
        return batch.divides and given < _last(layers, batch.where)

    batches = {name: batch_of(config, name) for name in stage_names(config)}
    return {name: batch for name, batch in batches.items() if batch and follows(name, batch)}


def _last(layers: Layers, key: str) -> int:
    """Which of them gives a key last; -1 where none does."""
    return max((number for number, keys in enumerate(layers) if key in keys), default=-1)


def rows_of_step(given: Mapping[str, Any], fields: Mapping[str, Field], processes: int) -> int:
    """Rows of an optimizer step of a stage with these fields, on all processes together. Of a rollout it takes a
    mini-batch of prompts with all their completions; where those are not of one size, a large one."""
    size, steps, group, parts = (_number(given, fields, key) for key in (PER_DEVICE, ACCUMULATION, _GROUP, _PARTS))
    return math.ceil(size * steps / group / parts) * group * processes


def _draws(method: Method) -> bool:
    return ACCUMULATION in method.owned_fields


def _number(given: Mapping[str, Any], fields: Mapping[str, Field], key: str) -> Any:
    return given.get(key, fields[key].default if key in fields else 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
