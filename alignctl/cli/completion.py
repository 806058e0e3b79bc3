"""What may follow on the command line, for shell completion. Torch-free; never fails, at worst it offers nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignctl.config.compose import compose, group_options, list_recipes, read_request
from alignctl.config.flat import flatten
from alignctl.config.stages import stage_names
from alignctl.config.trl_fields import config_fields
from alignctl.errors import AlignctlError
from alignctl.methods.registry import methods


def complete_override(given: Sequence[str], incomplete: str, recipe_dirs: Sequence[Path]) -> list[str]:
    """Offers for the word being typed, whole words, given the words before it."""
    try:
        recipe = [word for word in given if word.startswith("recipe=")]
        if incomplete.startswith("recipe=") or not recipe:
            offers = [f"recipe={recipe.name}" for recipe in list_recipes(recipe_dirs)]
        else:
            offers = _keys(recipe, recipe_dirs)
    except AlignctlError:
        return []
    return sorted(offer for offer in set(offers) if offer.startswith(incomplete))


def _keys(recipe: Sequence[str], recipe_dirs: Sequence[Path]) -> list[str]:
    """`group=option`, the recipe's own keys, and every field its stages take."""
    request = read_request(recipe, recipe_dirs)
    config, _ = compose(request)
    offers = [f"{group}={option}" for group, options in group_options(request).items() for option in options]
    offers += [f"{key}=" for key in flatten(config)]
    for stage in stage_names(config):
        method = methods()[config[stage]["method"]]
        offers += [f"{stage}.{key}=" for key in config_fields(method.config_class) if key not in method.owned_fields]
    return offers
