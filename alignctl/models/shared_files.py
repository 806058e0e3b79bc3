"""Checkpoints of what FSDP2 divides: each process writes its share, and any number of processes reads them again.

All of it lies in safetensors files of torch's own distributed checkpoints, and in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

_OPTIMIZER, _SETTINGS = "optimizer", "optimizer.json"
_OF = "weights"
"""Of a group of settings, the names of those that it is for."""
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes the trained weights of a model, those that are tied once; all processes call it together."""
    _save(_trained(model), folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Reads them into the shares of a model; all processes call it together."""
    _load(_trained(model), folder)


def save_state(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Writes what an optimizer keeps of a model's weights, and its settings; all processes call it together."""
    state = dict(_state(model, optimizer))
    _save({name: value for name, value in state.items() if isinstance(value, Tensor)}, folder / _OPTIMIZER)
    if distributed.get_rank() == 0:
        numbers = {name: value for name, value in state.items() if isinstance(value, _PLAIN)}
        names = _names(model)
        groups = [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, _PLAIN)}
            | {_OF: [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        content = {"groups": groups, "state": numbers}
        (folder / _SETTINGS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_state(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Reads it again; all processes call it together."""
    _init_optim_state(optimizer)  # a step with a learning rate of 0, so that there is something to read into
    state = dict(_state(model, optimizer))
    _load({name: value for name, value in state.items() if isinstance(value, Tensor)}, folder / _OPTIMIZER)
    kept = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    for name, parameter in model.named_parameters():
        found = optimizer.state.get(parameter, {})
        found.update({key: value for key in found if (value := kept["state"].get(f"{name}.{key}")) is not None})
    # Other processes may have had other groups: transformers makes one for each mesh among which weights are divided.
    names, of = _names(model), {name: group for group in kept["groups"] for name in group.pop(_OF)}
    for group in optimizer.param_groups:
        settings = of[names[group["params"][0]]] if group["params"] else {}
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        dcp.save(tensors, storage_writer=_Writer(str(folder), save_distributed=True))


class _Writer(HuggingFaceStorageWriter):
    """Leaves files to safetensors' `save_file`, which can be told to write them later; torch's own (2.13) makes all of
    a file in memory first."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shares = {item.index.fqn: planner.resolve_data(item).detach().contiguous() for item in plan.items}
        if shares:
            offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in plan.items}
            metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
            file = Path(self.path, _gen_file_name(1, 1, plan.storage_data["shard_index"]))
            save_file(shares, file, metadata | {FORMAT_KEY: FORMAT_VALUE})
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # which only an index of all files would be made of
        return done


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    if tensors:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}.{key}", value
