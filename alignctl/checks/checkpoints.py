"""Checks of the checkpoints that a run starts from or takes models from, by what their files say. Torch-free."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignctl.config.adapters import has_adapter
from alignctl.config.checkpoints import (
    FOUR_BITS,
    describe,
    find_flaw,
    find_flaw_of_training,
    find_missing_packages,
    quantization,
)
from alignctl.data.sources import is_hub_id
from alignctl.errors import Problem
from alignctl.methods.registry import Role


def check_checkpoint(
    where: str, path: str, role: Role, trained: bool = False, revision: str | None = None
) -> Iterator[Problem]:
    """Whether a path is a folder with a checkpoint for a role, or may be a Hub id.

    Args:
        where: The setting.
        trained: Whether the model of that role is the one that learns.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and not is_hub_id(path):
        yield Problem(f"`{where}={path}`: there is no such folder", "a Hub id has the form `owner/name`")
    elif folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = next((name for name in ("model", "adapter") if (folder / name).is_dir()), None)
        hint = f"a stage's model is in it: `{where}={folder / inside}`" if inside else None
        yield Problem(f"`{where}={path}`: the folder has no config.json, so it is not a checkpoint", hint)
    elif flaw := find_flaw(f"{where}={path}", path, role, trained, revision):
        yield flaw


def check_tokenizer_packages(where: str, path: str) -> Iterator[Problem]:
    """Whether there is what it takes to read the tokenizer of a folder or Hub id."""
    if missing := find_missing_packages(f"{where}={path}", path):
        yield missing


def check_trained_weights(
    where: str, path: str, model: Mapping[str, Any], peft: Mapping[str, Any]
) -> Iterator[Problem]:
    """Whether the weights of a checkpoint can be trained as `peft` says, and what is trained can be saved.

    Args:
        where: The setting that names the checkpoint.
        model: The section `model` of the stage.
        peft: The section `peft` of the stage.
    """
    described, into = describe(path, revision=model.get("revision")) or {}, model.get("merge_into")
    if isinstance(into, str):
        yield from check_checkpoint("model.merge_into", into, "policy", trained=True)
    keeps = not model.get("merge", True)
    if flaw := find_flaw_of_training(f"{where}={path}", described, has_adapter(peft), into, keeps):
        yield flaw
    if quantization(described) == FOUR_BITS and importlib.util.find_spec("bitsandbytes") is None:
        yield Problem(f"`{where}={path}` needs the package `bitsandbytes`", 'pip install "alignctl[bitsandbytes]"')


def check_dtype(model: Mapping[str, Any], peft: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether weights of that type can be trained: small updates are lost in float16, and large gradients overflow."""
    if model.get("dtype") == "float16" and not has_adapter(peft):
        yield Problem(
            "`model.dtype=float16`, and all weights are trained: their updates would be lost or overflow",
            "set `model.dtype=auto`, or train an adapter, `peft=lora`; `fp16=true` of the stage computes in float16",
        )
