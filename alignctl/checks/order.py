"""Checks of which stages run, in which order, and from what each starts. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignctl.checks.adapters import keeps_adapter_alone
from alignctl.checks.checkpoints import check_checkpoint
from alignctl.checks.values import method_of
from alignctl.config.schema import ROLE_KEYS
from alignctl.config.stages import stage_names
from alignctl.config.suggest import did_you_mean
from alignctl.errors import Problem


def check_stage_order(config: Mapping[str, Any], names: list[str]) -> Iterator[Problem]:
    """Whether every stage exists, runs once, and starts from one that runs before it."""
    stages = config.get("stages")
    if not isinstance(stages, list) or not all(isinstance(name, str) for name in stages):
        return
    for position, name in enumerate(stages):
        if name not in names:
            yield Problem(f"`stages` names `{name}`, which is not a stage of this recipe", did_you_mean(name, names))
            continue
        if name in stages[:position]:
            yield Problem(f"`stages` names `{name}` twice")
        for key in ("from", *ROLE_KEYS):
            source = config[name].get(key)
            if isinstance(source, str):
                yield from _source(config, f"{name}.{key}={source}", name, key, stages)


def _source(config: Mapping[str, Any], where: str, name: str, key: str, stages: list[str]) -> Iterator[Problem]:
    """Whether what a stage starts from, or takes the model of a role from, is a stage before it that trains such a
    model; a role's model may also be a checkpoint."""
    source = config[name][key]
    if key != "from" and source not in stages and source not in stage_names(config):
        if not _takes_adapter(config, name, key):
            yield from check_checkpoint(f"{name}.{key}", source, key)
    elif source == name:
        yield Problem(f"`{where}`: a stage cannot start from itself")
    elif problem := not_before(where, name, stages, f"start from `model` with `{name}.{key}=null`"):
        yield problem
    elif (giver := method_of(config, source)) and giver.product == "rows":
        yield Problem(
            f"`{where}`, but `{source}` makes rows and no model", f"to train on them: `{name}.data.from={source}`"
        )
    elif giver and keeps_adapter_alone(config, source) and not _takes_adapter(config, name, key):
        yield Problem(
            f"`{where}`, but `{source}` leaves an adapter and no model: `model.merge` is false there",
            f"set `{source}.model.merge=true`",
        )
    elif giver and (taker := method_of(config, name)):
        wanted = "reward_model" if key == "reward_model" else "policy"
        if giver.trained != wanted and not (key == "from" and giver.trained == taker.trained):
            trains = giver.trained.replace("_", " ")
            yield Problem(f"`{where}`, but `{source}` trains a {trains}, and a {wanted.replace('_', ' ')} is needed")


def _takes_adapter(config: Mapping[str, Any], name: str, key: str) -> bool:
    """Whether what is named under a key is taken as an adapter of the base, not as a whole model."""
    return key == "reward_model" and config[name].get("sharing") == "shared_base"


def not_before(where: str, name: str, stages: Sequence[str], instead: str) -> Problem | None:
    """What is wrong with a stage that names another one which has to be done before it; None where nothing is.

    Args:
        where: `key=STAGE`.
        name: Of the stage that names it.
        stages: That run, in order.
        instead: What else may be done.
    """
    key, _, source = where.partition("=")
    if source not in stages:
        near = did_you_mean(source, stages, prefix=f"{key}=")
        return Problem(
            f"`{where}`, but `{source}` is not in `stages` ({', '.join(stages)})",
            near if near and near.startswith("did") else f"add it to `stages`, or {instead}",
        )
    if source not in stages[: stages.index(name)]:
        return Problem(f"`{where}`, but `{source}` runs after `{name}`", f"put `{source}` first in `stages`")
    return None
