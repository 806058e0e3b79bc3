"""Runs jobs as scripts/run_many.py does, and writes down how many bytes of weights each process held at most.

Counted are the storages of all parameters, of their shares, and of every other tensor that has the shape of one of the
weights: what was gathered, copied, or loaded once more. Looked is whenever an engine has gathered something, and
whenever a file of weights is written or read; from when the trainer is built to when the stage has ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import trl  # noqa: F401 (all that is imported later would be looked through each time)
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from alignctl.stage import run
from alignctl.trainers.base.beside import Copies

RANK = int(os.environ.get("RANK", 0))
counter: Counter | None = None


class Counter:
    """Of one stage in one process."""

    def __init__(self, models: list[nn.Module]):
        self.models = models
        self.layers: dict[tuple[int, str], int] = {}
        self.shapes, self.peak, self.where, seen = set(), 0, "", set()
        for number, model in enumerate(models):
            for name, weight in model.named_parameters():
                if id(weight) not in seen:
                    seen.add(id(weight))
                    shape = tuple(getattr(weight, "ds_shape", weight.shape))
                    self.shapes |= {shape} if len(shape) > 1 else set()
                    layer = number, layer_of(name)
                    bytes_ = torch.Size(shape).numel() * weight.element_size()
                    self.layers[layer] = self.layers.get(layer, 0) + bytes_

    @property
    def outcome(self) -> dict:
        ends = [size for (model, name), size in self.layers.items() if model == 0 and name.endswith("embed_tokens")]
        sizes = {"all": sum(self.layers.values()), "layer": max(self.layers.values()), "embeddings": sum(ends)}
        return sizes | {"peak": self.peak, "where": self.where}

    def look(self, where: str, everywhere: bool) -> None:
        """Counts what is held, `everywhere` or of the models alone, which takes a hundredth of the time. While another
        thread counts, this one would go on."""
        if threading.current_thread() is not threading.main_thread():
            return
        storages, whole = {}, sum(self.layers.values())

        def add(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.nbytes() <= 4 * whole:  # else it is DeepSpeed's bucket of gradients
                storages[storage.data_ptr()] = storage.nbytes()

        for model in self.models:
            for weight in parameters_of(model):
                for part in (weight, getattr(weight, "ds_tensor", None)):
                    if part is not None and not part.is_meta:
                        add(part.to_local() if isinstance(part, DTensor) else part)
        for one in filter(is_plain, gc.get_objects() if everywhere else ()):
            if tuple(one.shape) in self.shapes and (isinstance(one, nn.Parameter) or not one.requires_grad):
                add(one)
        held = sum(storages.values())
        if held > self.peak:
            self.peak, self.where = held, where


def is_plain(one: object) -> bool:
    return issubclass(type(one), torch.Tensor) and not isinstance(one, DTensor) and not one.is_meta


def parameters_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """With those that FSDP2 has gathered."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            for one in group.fsdp_params if group else ():
                yield one._sharded_param_data
                if hasattr(one, "_unsharded_param"):
                    yield one._unsharded_param
                yield from one.all_gather_outputs


def layer_of(name: str) -> str:
    """A block of a model, or a module outside of blocks."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def looked_at(owner: object, name: str, before: bool = False, everywhere: bool = True) -> None:
    """Looks whenever a function has been called, or is."""
    usual = getattr(owner, name)

    def call(*args, **options):
        if before and counter:
            counter.look(name, everywhere)
        found = usual(*args, **options)
        if counter:
            counter.look(name, everywhere)
        return found

    setattr(owner, name, call)


looked_at(PartitionedParameterCoordinator, "fetch_sub_module", everywhere=False)
looked_at(FSDPParamGroup, "wait_for_unshard", everywhere=False)
looked_at(GatheredParameters, "__enter__")
looked_at(safetensors.torch, "_flatten_as_ptr", before=True)
looked_at(safetensors.torch, "load_file")
looked_at(torch, "save", before=True)
looked_at(Copies, "_add")
usual_from_pretrained = PreTrainedModel.from_pretrained.__func__


def from_pretrained(cls, *args, **options):
    found = usual_from_pretrained(cls, *args, **options)
    if counter:
        counter.look("from_pretrained", True)
    return found


PreTrainedModel.from_pretrained = classmethod(from_pretrained)
usual_begin, usual_work = run._begin, run._work


def begin(job):
    global counter
    trainer = usual_begin(job)
    models = [
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.ref_model,
        getattr(trainer, "reward_model", None),
    ]
    counter = Counter([model for model in models if model is not None])
    return trainer


def work(job):
    global counter
    usual_work(job)
    (job.paths.root / f"held_{RANK}.json").write_text(json.dumps(counter.outcome))
    counter = None


run._begin, run._work = begin, work
gc.collect()
gc.freeze()

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "run_many.py"), run_name="__main__")
