"""Writes and reads the weights of a model that processes divide, one layer after another: no process holds more than
its share and a layer.

A layer is a block of the model, or a module outside of blocks. Each is a file, as `from_pretrained` reads them: where
there are several, an index says which tensor is where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from alignctl.models.bits import sum_of_bits

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

Layer = Mapping[str, Tensor]
"""Tensors by their names."""


def is_first() -> bool:
    """Whether this process writes for all of them."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def once(tensors: Layer) -> dict[str, Tensor]:
    """Tensors by the first of their names: what is tied has several."""
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if names[id(tensor)] == name}


def layers_of(tensors: Layer) -> list[dict[str, Tensor]]:
    """Tensors of a model, those of a layer together."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        layers.setdefault(".".join(parts[: number + 1]), {})[name] = tensor
    return list(layers.values())


def without_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state of nothing, for `save_pretrained` to write all but the weights with."""
    return {name: torch.empty(0) for name in model.state_dict()} if isinstance(model, PeftModel) else {}


@contextmanager
def gathered(tensors: Layer) -> Iterator[dict[str, Tensor]]:
    """All of tensors of which processes hold shares; they enter together, and what is written to them is lost."""
    sharded = [tensor for tensor in tensors.values() if hasattr(tensor, "ds_id")]
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded):
            yield {name: tensor.detach() for name, tensor in tensors.items()}
    else:
        yield {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            for name, tensor in tensors.items()
        }


def write_layers(
    folder: Path,
    stem: str,
    layers: list[dict[str, Tensor]],
    finish: Callable[[dict[str, Tensor]], Layer] = dict,
    by_all: bool = False,
) -> dict[str, int]:
    """Writes layers to `stem.safetensors`, or to several files and `stem.safetensors.index.json`; all processes call it
    together.

    Args:
        finish: Gives what is written of a layer, from all of its weights by their names.
        by_all: Whether the processes write a layer each in turn, or the first one all of them.

    Returns:
        Of each tensor that was written the sum of its bits; nothing where not the first process writes all of them.
    """
    index: dict[str, str] = {}
    sums: dict[str, int] = {}
    size = 0
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    for number, layer in enumerate(layers):
        with gathered(layer) as whole:
            writer = number % processes if by_all else 0
            if rank in (0, writer):
                of_several = f"-{number + 1:05}-of-{len(layers):05}" if len(layers) > 1 else ""
                name = f"{stem}{of_several}.safetensors"
                ready = {key: tensor.contiguous() for key, tensor in finish(whole).items()}
                index |= dict.fromkeys(ready, name)
                size += sum(tensor.nbytes for tensor in ready.values())
                if ready and rank == writer:
                    save_file(ready, folder / name, metadata={"format": "pt"})
                if not by_all:
                    sums |= {key: int(sum_of_bits(tensor)) for key, tensor in ready.items()}
                del ready
            del whole
    if rank == 0 and len(layers) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return sums


def write_file(file: Path, tensors: Layer) -> None:
    """Writes all tensors to one file of safetensors, for what is read from one alone, as an adapter is; all processes
    call it together, and the first one writes."""
    layers, end = layers_of(tensors), 0
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    for name, tensor in (item for layer in layers for item in layer.items()):
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        begin, end = end, end + prod(shape) * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") if is_first() else nullcontext() as out:
        if out:
            out.write(len(text).to_bytes(8, "little") + text)
        for layer in layers:
            with gathered(layer) as whole:
                for tensor in whole.values() if out else ():
                    out.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
                whole.clear()


@torch.no_grad()
def read_layers(folder: Path, stem: str, tensors: Layer) -> None:
    """Fills tensors with what `write_layers` wrote of them; all processes call it together."""
    index = folder / f"{stem}.safetensors.index.json"
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
    for name, tensor in tensors.items():
        file = folder / files.get(name, f"{stem}.safetensors")
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                if is_first():
                    tensor.copy_(_read(file, name))
        elif isinstance(tensor, DTensor):
            whole = _read(file, name).to(tensor.device, tensor.dtype)
            tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(_read(file, name))


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
