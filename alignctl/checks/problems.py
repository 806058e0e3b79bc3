"""Finds everything that is wrong with a composed config, before anything heavy is imported. Torch-free.

Each check looks at one thing and yields problems; `find_problems` runs them all, so several mistakes are reported
together. Nothing here changes the config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from alignctl.checks.adapters import check_adapter, check_kept_alone
from alignctl.checks.batches import check_batch, check_batch_of_all
from alignctl.checks.combinations import check_combinations, check_unused
from alignctl.checks.inputs import check_data, check_model, check_run_dir
from alignctl.checks.keys import check_secrets, check_stage, check_top_level
from alignctl.checks.launch import check_launch
from alignctl.checks.order import check_stage_order
from alignctl.checks.rewards import check_rewards
from alignctl.checks.rows import check_rows_from
from alignctl.checks.rows_together import check_rows_together
from alignctl.checks.values import method_of
from alignctl.config.compose import Request, compose
from alignctl.config.stages import stage_names
from alignctl.errors import Problem, RequestError


def checked(request: Request) -> dict[str, Any]:
    """The composed config of a request with nothing wrong.

    Raises:
        RequestError: With all that is wrong.
    """
    config, problems = compose(request)
    if problems := problems + find_problems(config):
        raise RequestError.from_problems(problems)
    return config


def find_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Runs every check on a composed config; an empty list means that it can be planned."""
    names = stage_names(config)
    problems = [*check_top_level(config), *check_secrets(config)]
    for name in names:
        problems += check_stage(config, name)
    unusable = {problem.unusable for problem in problems if problem.unusable}
    unusable.discard("stages")  # of which those that are names are looked at
    rest = _without(config, unusable)
    told = [f"`{key}" for key in unusable]
    problems += [one for one in _of_usable(rest, names) if not any(key in one.message for key in told)]
    return list(dict.fromkeys(problems))


def _without(config: Mapping[str, Any], unusable: Collection[str], before: str = "") -> dict[str, Any]:
    """A config without values that are of no use, wherever a section is one of the run or of a stage."""
    return {
        key: _without(value, unusable, f"{before}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if isinstance(key, str) and not {f"{before}{key}", f"{before}{key}".partition(".")[2]} & set(unusable)
    }


def _of_usable(config: Mapping[str, Any], names: list[str]) -> list[Problem]:
    """What is wrong with values that are each what they have to be."""
    names = [name for name in names if name in config and "method" in config[name]]
    problems = [*check_run_dir(config), *check_stage_order(config, names)]
    to_run = _stages_to_run(config, names)
    for name in to_run:
        problems += [*check_model(config, name), *check_rows_from(config, name), *check_data(config, name)]
        problems += [*check_combinations(config, name), *check_adapter(config, name)]
        problems += [*check_rewards(config, name), *check_batch(config, name)]
    problems += [*check_kept_alone(config, to_run), *check_unused(config, to_run), *check_launch(config, to_run)]
    problems += [*check_batch_of_all(config, to_run), *check_rows_together(config, to_run)]
    return problems


def _stages_to_run(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """The stages that will run, as far as they can be checked further."""
    stages = config.get("stages")
    wanted = [name for name in stages if isinstance(name, str)] if isinstance(stages, list) else []
    return [name for name in wanted if name in names and method_of(config, name)]
