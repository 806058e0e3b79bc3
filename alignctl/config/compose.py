"""Turns a recipe and overrides into one plain config. The only module that imports hydra. Torch-free.

A recipe is Hydra's primary config; groups come from conf/ and from the folders of the user's own recipes. Overrides
follow Hydra's grammar, with one difference: a key that the recipe does not list needs no `+`, because checks/
knows which keys exist and says so with a suggestion.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from alignctl.config.batches import settle, settled
from alignctl.config.interpolations import find_flaw
from alignctl.config.recipe_files import look_at
from alignctl.config.renamed import former_names, rename_data
from alignctl.config.resolving import resolved
from alignctl.config.schema import SECTIONS, LauncherSettings, RunSettings, annotations
from alignctl.config.secrets import take_note
from alignctl.config.suggest import did_you_mean
from alignctl.errors import Problem, RequestError, raised_in

DEFAULT_RECIPE = "quickstart"
_SUFFIX, _COMMAND_LINE = ".yaml", "command line"
_MOST_LETTERS, _MOST_TEXT = 200, 100_000  # of a key, and of an override
_MOST_POINTS = 1_000  # of a sweep


def _shipped(folder: str) -> Path:
    """conf/ or recipes/: inside the installed package, else at the root of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_data" / folder
    return installed if installed.is_dir() else package.parent / folder


CONF_DIR = _shipped("conf")
RECIPES_DIR = _shipped("recipes")


@dataclass(frozen=True)
class Recipe:
    """A recipe file."""

    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first line of the comment on top."""
        with self.path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.startswith("#") and line.strip("# \n")), "")
        return first.strip("# \n")


@dataclass(frozen=True)
class Request:
    """What a user asked for: a recipe, overrides, and where else to look for recipes."""

    recipe: Recipe
    overrides: tuple[str, ...]
    recipe_dirs: tuple[Path, ...]


def list_recipes(recipe_dirs: Sequence[Path] = ()) -> list[Recipe]:
    """All recipes by name; a user's own hides a shipped one of the same name."""
    found: dict[str, Recipe] = {}
    for folder in (RECIPES_DIR, *reversed(_folders(recipe_dirs))):
        for path in _recipe_files(folder):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found[name] = Recipe(name, path)
    return sorted(found.values(), key=lambda recipe: recipe.name)


def read_request(arguments: Sequence[str], recipe_dirs: Sequence[Path] = ()) -> Request:
    """Takes `recipe=...` out of the arguments and finds the recipe.

    Raises:
        RequestError: No such recipe, or `recipe=` more than once, or a file without `recipe=` before it.
    """
    recipe_dirs = _folders(recipe_dirs)
    if file := next((word for word in arguments if "=" not in word and word.endswith((_SUFFIX, ".yml"))), None):
        place = "" if file.startswith(("/", "./", "../", "~")) else "./"
        raise RequestError(f"`{file}` is not an override", f"a recipe in a file is `recipe={place}{file}`")
    named = [argument for argument in arguments if argument.startswith("recipe=")]
    if len(named) > 1:
        raise RequestError(f"`recipe` is given {len(named)} times: {', '.join(named)}")
    name = named[0].partition("=")[2] if named else DEFAULT_RECIPE
    overrides = tuple(argument for argument in arguments if not argument.startswith("recipe="))
    return Request(_find_recipe(name, recipe_dirs), overrides, recipe_dirs)


def compose(request: Request) -> tuple[dict[str, Any], list[Problem]]:
    """Composes a request into plain dicts, lists and values, interpolations resolved, but for variables of the
    environment that are secret, which stay as they are named.

    Overrides that cannot be applied (unknown group or option, broken syntax) are left out and returned as problems, so
    that checks/ can report the rest of what is wrong beside them.

    Raises:
        RequestError: The recipe itself cannot be composed.
    """
    loader = _loader(request)
    overrides, problems = _checked_overrides(request, loader)
    with suppress(RequestError):
        return _load(request, loader, overrides), problems
    config = _load(request, loader, [])  # raises again when the recipe itself is wrong
    # Some override is: halves of them are applied to find which.
    accepted: list[str] = []
    waiting = [overrides]
    while waiting:
        some = waiting.pop()
        try:
            config = _load(request, loader, [*accepted, *some])
            accepted += some
        except RequestError as error:
            if len(some) > 1:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
            else:
                problems.append(_not_applied(some[0], error))
    return config, problems


def _not_applied(override: str, error: RequestError) -> Problem:
    """Why one override, in itself well written, cannot be applied."""
    reason = error.problems[0].message
    if "Could not append to config" in reason:
        return Problem(f"`{override}` adds a key that is there already", f"write `{override.lstrip('+')}`")
    return Problem(f"`{override.removeprefix('++')}`: {reason.partition('): ')[2] or reason}")


def value_sources(request: Request) -> dict[str, str]:
    """The file, or `command line`, that each value of the composed config came from, by dotted key."""
    loader = _loader(request)
    overrides, _ = _checked_overrides(request, loader)
    sources: dict[str, str] = {}
    for loaded, place, file in _files(request, loader, overrides):
        _assign(sources, place, loaded.config, file)
    for override in _parse(request.overrides, []):
        if not loader.get_group_options(override.key_or_group) and not override.is_delete():
            _assign(sources, override.key_or_group, _node(override), _COMMAND_LINE)
    config = compose(request)[0]
    for stage, former, name in former_names(config):
        file = sources.pop(f"{stage}.{former}", None)
        if file and _given_last(request, loader, overrides, stage, (former, name)) == former:
            sources[f"{stage}.{name}"] = file
    layers = [keys for _, keys in _layers(request, loader, overrides)]
    for name, batch in settled(config, layers).items():
        sources[f"{name}.{batch.follows}"] = f"follows from `{batch.where}`"
    composed = set(_leaves(OmegaConf.create(config)))
    return {key: file for key, file in sources.items() if key in composed}


def group_options(request: Request) -> dict[str, list[str]]:
    """Groups of the recipe, as they are written on the command line, and the options of each."""
    loader = _loader(request)
    return {name: loader.get_group_options(name.partition("@")[0]) for name in _groups(request, loader)}


def expand_sweep(request: Request) -> list[Request]:
    """All points of a sweep: one request for each combination of the swept overrides' values, in order."""
    problems: list[Problem] = []
    choices = []
    for override in _parse(request.overrides, problems, _loader(request)):
        key = override.input_line.partition("=")[0]
        try:
            values = _swept_values(override) if override.is_sweep_override() else None
            choices.append([override.input_line] if values is None else [f"{key}={value}" for value in values])
        except (HydraException, ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
            problems.append(Problem(f"cannot sweep over `{override.input_line}`: {error}", "list the values: `a,b,c`"))
    if not problems and (points := math.prod(map(len, choices))) > _MOST_POINTS:
        problems.append(Problem(f"the sweep has {points:,} points, and one has at most {_MOST_POINTS:,}"))
    if problems:
        raise RequestError.from_problems(problems)
    return [Request(request.recipe, point, request.recipe_dirs) for point in itertools.product(*choices)]


def _swept_values(override: Override) -> list[str]:
    """The values of one swept override, each once.

    Raises:
        ValueError: There are none, or too many.
    """
    swept = override.value()
    if isinstance(swept, RangeSweep) and not swept.step:
        raise ValueError("its step is 0")
    values = list(dict.fromkeys(itertools.islice(override.sweep_string_iterator(), _MOST_POINTS + 1)))
    if not values:
        raise ValueError("it has no values")
    if len(values) > _MOST_POINTS:
        raise ValueError(f"it has more than {_MOST_POINTS:,} values")
    return values


def swept(request: Request, point: Request) -> list[str]:
    """The overrides of one point of a sweep that other points have otherwise."""
    return [own for own, given in zip(point.overrides, request.overrides, strict=True) if own != given]


def _find_recipe(name: str, recipe_dirs: Sequence[Path]) -> Recipe:
    path = Path(name).expanduser()
    if path.suffix == ".yml":
        raise RequestError(
            f"`recipe={name}`: Hydra reads files that end with `.yaml`", f"rename it to `{path.stem}.yaml`"
        )
    if path.suffix == _SUFFIX:
        if path.is_file():
            return Recipe(path.stem, path.resolve())
        raise RequestError(f"`recipe={name}`: there is no such file", f"recipes by name: {_names(recipe_dirs)}")
    for folder in (*recipe_dirs, RECIPES_DIR):
        if name and (folder / (name + _SUFFIX)).is_file():
            return Recipe(name, folder / (name + _SUFFIX))
    names = [recipe.name for recipe in list_recipes(recipe_dirs)]
    raise RequestError(
        f"unknown recipe `{name}`",
        did_you_mean(name, names, prefix="recipe=") or f"see `alignctl recipes`; there are {len(names)}",
    )


def _names(recipe_dirs: Sequence[Path]) -> str:
    return ", ".join(recipe.name for recipe in list_recipes(recipe_dirs))


def _folders(recipe_dirs: Sequence[Path]) -> tuple[Path, ...]:
    for folder in recipe_dirs:
        if not folder.is_dir():
            raise RequestError(f"`--recipe-dir {folder}` is not a folder")
    return tuple(folder.resolve() for folder in recipe_dirs)


def _recipe_files(folder: Path) -> list[Path]:
    """Recipes in a folder and those below it; not runs, and not groups, which may stand beside them."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in groups and not name.startswith(".")]
        if "plan.json" in files:
            folders.clear()
        else:
            found += [Path(root, name) for name in files if name.endswith(_SUFFIX) and _is_recipe(Path(root, name))]
    return sorted(found)


def _is_recipe(path: Path) -> bool:
    """Whether a YAML file says which stages run, or starts from a recipe that does."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.startswith(("stages:", "defaults:")) for line in lines)


def _loader(request: Request) -> ConfigLoaderImpl:
    """Hydra's loader for one recipe: it sees the recipe's folder, the user's folders, conf/ and recipes/."""
    folders = (request.recipe.path.parent, *request.recipe_dirs, CONF_DIR, RECIPES_DIR)
    Plugins.instance()  # registers the kinds of source a search path may name
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    for folder in folders:
        search_path.append("main" if folder == folders[0] else "alignctl", f"file://{folder}")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    loader.repository = _Repository(search_path)
    return loader


class _Repository(ConfigRepository):
    """Hydra's, which looks at files of users before it reads them."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source and source.scheme() == "file" and source.path not in map(str, (CONF_DIR, RECIPES_DIR)):
            look_at(Path(source.path, config_path.removesuffix(_SUFFIX) + _SUFFIX))
        return super().load_config(config_path)


def _load(request: Request, loader: ConfigLoaderImpl, overrides: list[str]) -> dict[str, Any]:
    def load() -> Any:
        config = loader.load_configuration(request.recipe.path.stem, overrides, RunMode.RUN, from_shell=False)
        with open_dict(config):
            del config["hydra"]
        if flaw := find_flaw(OmegaConf.to_container(config, resolve=False)):
            raise RequestError(f"{_named(request)}: {flaw}")
        return resolved(config)

    config = _translated(request, load)
    for stage, former, name in former_names(config):
        if former in config[stage]:
            value = config[stage].pop(former)
            if name not in config[stage] or _given_last(request, loader, overrides, stage, (former, name)) == former:
                config[stage][name] = value
    rename_data(config)
    settle(config, lambda: [keys for _, keys in _layers(request, loader, overrides)])
    take_note(config)
    return config


def _given_last(
    request: Request, loader: ConfigLoaderImpl, overrides: list[str], stage: str, names: tuple[str, str]
) -> str:
    """Of two names of one field of a stage, the former one first, that by which the last file gives it that has one, or
    the command line.

    Raises:
        RequestError: One of them has both.
    """
    for where, keys in reversed(_layers(request, loader, overrides)):
        given = [name for name in names if f"{stage}.{name}" in keys]
        if len(given) > 1:
            former, name = (f"`{stage}.{one}`" for one in names)
            raise RequestError(f"{former} is another name of {name}, and {where} has both", f"take {former} out")
        if given:
            return given[0]
    raise AssertionError("one of them is there")


def _layers(request: Request, loader: ConfigLoaderImpl, overrides: list[str]) -> list[tuple[str, dict[str, str]]]:
    """The files that are composed, in order, and the command line, each with the dotted keys that it gives."""
    layers: list[tuple[str, dict[str, str]]] = []
    for loaded, place, file in _files(request, loader, overrides):
        layers.append((file, {}))
        _assign(layers[-1][1], place, loaded.config, "")
    layers.append(("the command line", {}))
    for override in _parse(overrides, []):
        if not override.is_delete() and not loader.get_group_options(override.key_or_group):
            _assign(layers[-1][1], override.key_or_group, _node(override), "")
    return layers


def _files(request: Request, loader: ConfigLoaderImpl, overrides: list[str]) -> Iterator[tuple[ConfigResult, str, str]]:
    """The files that are composed, in order: each with its place in the config, and where it lies."""
    for item in loader.compute_defaults_list(request.recipe.path.stem, overrides, RunMode.RUN).defaults:
        if item.config_path is None or item.package == "hydra" or item.config_path.startswith("hydra/"):
            continue
        loaded = loader.repository.load_config(item.config_path)
        file = loaded.path.removeprefix("file://") + "/" + item.config_path + ".yaml"
        yield loaded, item.package if item.package != "_global_" else "", file


_MANY_DIGITS = re.compile(r"""(?<![\w"'])\d{41,}(?![\w"'])""")
_TOKEN = r"[^\[\]\"'\\${}(),]+"
_TOKENS = re.compile(rf"\[{_TOKEN}(,{_TOKEN})*\]")
_PLAIN_LIST = re.compile(r"\[[^\[\]{}'\"]+\]")


def _items_quoted(text: str) -> str:
    """An override with a plain list, `[<tool>,</tool>]` for example, whose items have characters that Hydra wants
    quoted; others as they are."""
    key, _, value = text.partition("=")
    if not ("<" in value and _TOKENS.fullmatch(value)):
        return text
    return f"{key}={_quoted_items(value)}"


def _quoted_items(value: str) -> str | None:
    """A plain list with its items in quotes; None of what is none."""
    if not _PLAIN_LIST.fullmatch(value):
        return None
    return f"[{','.join(json.dumps(item.strip(), ensure_ascii=False) for item in value[1:-1].split(','))}]"


def _parse(overrides: Sequence[str], problems: list[Problem], loader: ConfigLoaderImpl | None = None) -> list[Override]:
    """Parses what can be parsed; the rest goes to `problems`. With a loader, `glob(*)` finds options of groups."""
    parsed: list[Override] = []
    for text in overrides:
        if problem := _not_taken(text):
            problems.append(problem)
            continue
        if "=" not in text and not text.startswith("~"):
            known = text in {recipe.name for recipe in list_recipes()}
            hint = f"write `recipe={text}`" if known else "write `key=value`, for example `dpo.beta=0.2`"
            problems.append(Problem(f"`{text}` is not an override", hint))
            continue
        try:
            parsed += OverridesParser.create(config_loader=loader).parse_overrides([_items_quoted(text)])
        except (HydraException, RecursionError, ValueError) as error:
            key, _, value = text.partition("=")
            quoted = _quoted_items(value) or f'"{value}"'
            hint = f"quote a value with special characters: `{shlex.quote(f'{key}={quoted}')}`"
            reason = str(error).splitlines()[0]
            reason = "" if "Exception" in reason else f": {reason}"
            problems.append(Problem(f"cannot read the override `{text}`{reason}", hint))
    return parsed


def _not_taken(text: str) -> Problem | None:
    """What is wrong with an override before Hydra's grammar looks at it."""
    key = text.partition("=")[0].lstrip("+~")
    if key == "hydra" or key.startswith(("hydra.", "hydra/", "hydra@")):
        return Problem(f"`{key}`: settings of Hydra itself are not taken", "take it out")
    if len(key) > _MOST_LETTERS:
        return Problem(f"`{key[:20]}...` has {len(key):,} letters, and no key has more than {_MOST_LETTERS}")
    if len(text) > _MOST_TEXT:
        return Problem(f"the value of `{key}` has more than {_MOST_TEXT:,} characters", "give a file, or a recipe")
    if digits := _MANY_DIGITS.search(text):
        return Problem(f"`{key}` has a number of {len(digits[0]):,} digits", "write it as text, in quotes, or shorter")
    if text.startswith("~") and "=" in text:
        return Problem(f"`~{key}` takes a key out, and has no value", f"write `~{key}`")
    return None


def _checked_overrides(request: Request, loader: ConfigLoaderImpl) -> tuple[list[str], list[Problem]]:
    """The overrides for Hydra, and what is wrong with the others. Plain values are allowed to add a key."""
    groups = cache(partial(_groups, request, loader))  # takes a third of the time of a composition; most need none
    overrides: list[str] = []
    problems: list[Problem] = []
    for override in _parse(request.overrides, problems):
        key = override.key_or_group
        options = loader.get_group_options(key)
        problem = None
        if override.is_sweep_override():
            problem = Problem(f"`{override.input_line}` gives several values", _several_hint(override))
        elif options or override.package:
            problem = _group_problem(override, options, groups)
        else:
            problem = _number_problem(override)
        if problem:
            problems.append(problem)
        elif options or override.is_add() or override.is_force_add() or override.is_delete():
            overrides.append(override.input_line)
        else:
            overrides.append("++" + override.input_line)
    return overrides, problems


def _groups(request: Request, loader: ConfigLoaderImpl) -> list[str]:
    """Groups in the recipe's defaults, `group` or `group@place`."""
    defaults = _translated(request, lambda: loader.compute_defaults_list(request.recipe.path.stem, [], RunMode.RUN))
    return [name for name in defaults.overrides.known_choices if not name.startswith("hydra/")]


def _group_problem(override: Override, options: Sequence[str], groups: Callable[[], list[str]]) -> Problem | None:
    group = override.key_or_group
    name = group + (f"@{override.package}" if override.package else "")
    if not options:
        return Problem(f"unknown group `{group}` in `{override.input_line}`", did_you_mean(name, groups()))
    if name not in groups() and not (override.is_add() or override.is_force_add()):
        placed = [other for other in groups() if other.split("@")[0] == group]
        hint = f"this recipe has {', '.join(f'`{other}=...`' for other in placed)}" if placed else None
        return Problem(f"`{name}` is not a group of this recipe", hint or f"add it with `+{override.input_line}`")
    value = override.value()
    if override.is_delete() or value in options:
        return None
    hint = did_you_mean(str(value), options, prefix=f"{name}=")
    return Problem(f"unknown {group} `{value}` in `{override.input_line}`", hint)


def _several_hint(override: Override) -> str:
    """How to say several values: as points of a sweep, as a list, or as text with commas in it."""
    key, typed, wanted = override.key_or_group, override.input_line.partition("=")[2], _annotation(override)
    sweep = "sweep over them with `--multirun`"
    if not isinstance(override.value(), ChoiceSweep) or "(" in typed:  # a range, or what Hydra has functions for
        return sweep
    as_list, as_text = shlex.quote(f"{key}=[{typed}]"), shlex.quote(f'{key}="{typed}"')
    if wanted is None:
        return f"{sweep}, or write a list where one is taken: `{as_list}`"
    if "list" in wanted:
        return f"{sweep}, or write a list: `{as_list}`"
    return f"{sweep}, or quote it to make it text: `{as_text}`" if "str" in wanted else sweep


def _annotation(override: Override) -> str | None:
    """What an override of ours has to be; None for a trainer's."""
    *before, key = override.key_or_group.split(".")
    settings = (SECTIONS | {"launcher": LauncherSettings}).get(before[-1]) if before else RunSettings
    return annotations(settings).get(key) if settings else None


def _number_problem(override: Override) -> Problem | None:
    """Whether Hydra reads what has to be text as a number that looks otherwise: the hash 12345e6 as 12345000000.0."""
    wanted = _annotation(override)
    value, typed = None if override.is_delete() else override.value(), override.input_line.partition("=")[2]
    if wanted not in ("str", "str | None") or not isinstance(value, (int, float)) or str(value) == typed:
        return None
    hint = f"""quote it to make it text: `'{override.key_or_group}="{typed}"'`"""
    return Problem(f"`{override.key_or_group}` must be text, and `{typed}` is read as `{value}`", hint)


def _named(request: Request) -> str:
    return f"recipe `{request.recipe.name}` ({request.recipe.path})"


def _translated(request: Request, action: Callable[[], Any]) -> Any:
    """Runs a step of Hydra's; its errors become one paragraph about the recipe."""
    try:
        return action()
    except RecursionError as error:
        raise RequestError(
            f"{_named(request)} starts from itself", "give it another name than the recipe in its `defaults`"
        ) from error
    except OSError as error:
        raise RequestError(f"{_named(request)} cannot be read: {error}") from error
    except RequestError:
        raise
    except Exception as error:
        if raised_in(error).partition(".")[0] not in ("hydra", "omegaconf", "yaml", "antlr4"):
            raise
        raise RequestError(f"{_named(request)}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What Hydra says, in one line, after the key that it is about."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause if str(cause) else error).splitlines()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    reason = " ".join(line for line in lines if line and not line.startswith(("full_key", "object_type")))
    return (f"`{key}`: " if key and key not in reason else "") + (reason or type(cause).__name__)


def _assign(sources: dict[str, str], prefix: str | None, node: Any, file: str) -> None:
    """Notes `file` as the source of every value in `node`."""
    for leaf in _leaves(node) if isinstance(node, DictConfig) else [""]:
        sources[".".join(filter(None, (prefix, leaf)))] = file


def _node(override: Override) -> Any:
    """The value of an override as it would stand in a config, interpolations as they are."""
    return OmegaConf.create([override.value()])._get_node(0)


def _leaves(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of all values in a config; a list is one value."""
    keys = []
    for key in node:
        child, name = node._get_node(key), f"{prefix}{key}"
        keys += _leaves(child, f"{name}.") if isinstance(child, DictConfig) and not child._is_none() else [name]
    return keys
