"""Whether the models of a stage with `sharing=shared_base` can be adapters of one base. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.config.adapters import changes_base, has_adapter
from alignctl.config.checkpoints import describe
from alignctl.config.stages import merged_section, stage_names
from alignctl.data.sources import is_hub_id
from alignctl.errors import Problem


def check_shared_base(config: Mapping[str, Any], name: str, peft: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps policy, value model and reward model of a stage with this `peft` from being adapters of one base."""
    stage = config[name]
    layout = f"`{name}.sharing=shared_base`"
    if not has_adapter(peft):
        yield Problem(
            f"{layout} needs an adapter: policy, value model and reward model are adapters of one base",
            f"set `peft=lora`, or `{name}.sharing=separate`",
        )
    yield from _changed(layout, "peft", peft)
    if (stage.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
        yield Problem(
            f"{layout} and `{name}.activation_checkpointing_kwargs.use_reentrant=true` exclude each other",
            "take `use_reentrant` out",
        )
    source = stage.get("reward_model")
    if isinstance(source, str) and source in stage_names(config):
        yield from _from_stage(config, name, source)
    elif isinstance(source, str):
        yield from _from_folder(config, name, source)


def _from_stage(config: Mapping[str, Any], name: str, source: str) -> Iterator[Problem]:
    """Whether a reward stage trains an adapter of what the stage starts from."""
    layout = f"`{name}.sharing=shared_base`"
    if not has_adapter(merged_section(config, source, "peft")):
        yield Problem(
            f"{layout} needs a reward model that is an adapter, but `{source}` trains all weights",
            f"set `{source}.peft.type=lora`, or `{name}.sharing=separate`",
        )
    yield from _changed(layout, f"{source}.peft", merged_section(config, source, "peft"))
    ours, theirs = (config[one].get("from") for one in (name, source))
    if ours != theirs:
        yield Problem(
            f"{layout} needs one base, but `{name}` starts from `{ours or 'model'}` and `{source}` from "
            f"`{theirs or 'model'}`",
            f"set `{source}.from={ours or 'null'}`, or `{name}.sharing=separate`",
        )
    elif ours is None:
        for key in ("path", "revision", "scratch"):
            mine, other = (merged_section(config, one, "model").get(key) for one in (name, source))
            if mine != other:
                yield Problem(f"{layout} needs one base, but `{name}.model.{key}` and `{source}.model.{key}` differ")
            elif key == "scratch" and mine is not None:
                yield Problem(
                    f"{layout} needs one base, but `{name}` and `{source}` start from random weights of their own",
                    "put a stage before them that both start from",
                )


def _from_folder(config: Mapping[str, Any], name: str, source: str) -> Iterator[Problem]:
    """Whether a folder or Hub id holds an adapter of what the stage starts from; the worker looks at what is not on
    this machine yet."""
    where = f"`{name}.reward_model={source}`"
    is_folder = Path(source).expanduser().is_dir()
    if not is_folder and not is_hub_id(source):
        yield Problem(f"{where}: there is no such folder", "a Hub id has the form `owner/name`")
        return
    described = describe(source, "adapter_config.json") or {}
    base = described.get("base_model_name_or_path")
    if base is None:
        if is_folder:
            yield Problem(
                f"{where}: the folder holds no adapter, and with `{name}.sharing=shared_base` the reward model must be "
                "one",
                f"name the folder `adapter/` of a reward stage, or set `{name}.sharing=separate`",
            )
        return
    if setting := changes_base(described):
        yield Problem(f"{where} was trained with `{setting}`, which changed the base's own weights")
    start, path = config[name].get("from"), merged_section(config, name, "model").get("path")
    if start is not None or not _same(path, base):
        yield Problem(
            f"{where} is an adapter of {base}, but `{name}` starts from `{start or path}`",
            f"set `{name}.from=null` and `model.path={base}`, or `{name}.sharing=separate`",
        )


def _changed(layout: str, where: str, peft: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether an adapter changes what is under it."""
    if setting := changes_base(peft):
        yield Problem(f"{layout} and `{where}.{setting}` exclude each other: it changes the base's own weights")


def _same(one: Any, other: Any) -> bool:
    """Whether two folders or Hub ids are the same."""
    places = [Path(str(place)).expanduser() for place in (one, other)]
    return one == other or all(place.is_dir() for place in places) and places[0].samefile(places[1])
