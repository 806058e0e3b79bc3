"""Models that PyTorch's FSDP2 divides among processes: each reads its share of the weights, and a layer gathers its own
when it is run.

A model that was read in shares knows nothing of FSDP yet. Its weights are without numbers, so that adapters are put on
it as on any other, and each has the share that `divide` fills it with.

Where processes side by side divide the matrices of layers besides (tensor_plan.py), a share is of this process's part
of a matrix, which those gather that have the same part. Embeddings and head are divided among all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from alignctl.models.tensor_plan import blocks_of, divide_matrices, divided_dims

_SHARES, _MATRICES = "dp_shard", "tp"
_EXPERTS = (MergeModulelist, Concatenate)
"""What becomes of the weights of experts as they are read: each whole into its place in a list of them, so a process
can leave out those of others. What else becomes of weights as they are read wants them whole."""

Place = tuple[nn.Module, str]


def allow_fsdp_on_cpu() -> None:
    """Lets accelerate divide weights by FSDP among processes without GPUs; to be called once they have found each
    other, before a trainer is built.

    accelerate (1.15) looks for FSDP only among types of processes that are on GPUs, and elsewhere copies the model to
    each process, without a word. The type is all it looks at: devices and gloo are as they were.
    """
    processes = PartialState()
    if processes.distributed_type == DistributedType.MULTI_CPU:
        processes._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def processes_mesh(device: torch.device, tp_size: int = 1, timeout_s: float = 1800) -> DeviceMesh:
    """All processes, among which weights are divided; with two dimensions where so many side by side divide the
    matrices of layers.

    Args:
        timeout_s: How long the processes of a row or a column wait for each other; all of them as torch was told.
    """
    return _grid(device.type, tp_size, timeout_s) if tp_size > 1 else _all(device.type)


def _all(device: str) -> DeviceMesh:
    return init_device_mesh(device, (get_world_size(),), mesh_dim_names=(_SHARES,))


@cache
def _grid(device: str, tp_size: int, timeout_s: float) -> DeviceMesh:
    """Made once, because the processes of each row and column have to find each other."""
    mesh = init_device_mesh(device, (get_world_size() // tp_size, tp_size), mesh_dim_names=(_SHARES, _MATRICES))
    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(seconds=timeout_s), group)
    return mesh


@contextmanager
def read_in_shares(mesh: DeviceMesh | None) -> Iterator[None]:
    """Of the models that are loaded here each process reads its share of the weights, by the rows of each; other
    weights, as a new head, are whole. With None all are, also within a block that has a mesh.

    transformers (5.23) reads into a DTensor its share alone, whatever made it one; its own way divides as it loads,
    before there is an adapter.
    """
    usual = PreTrainedModel._load_pretrained_model
    plain = getattr(usual, "plain", usual)

    def load(model: PreTrainedModel, state_dict: Any, files: Any, config: Any, *args: Any, **options: Any) -> Any:
        if mesh is not None and _can_be_read_in_shares(model, config, mesh.size()):
            _expect_shares(model, mesh)
        return plain(model, state_dict, files, config, *args, **options)

    load.plain = plain
    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(usual)


def _can_be_read_in_shares(model: PreTrainedModel, config: Any, processes: int) -> bool:
    converters = [one for one in config.weight_mapping or [] if isinstance(one, WeightConverter)]
    operations = [one for converter in converters for one in converter.operations]
    if operations and any(p.dim() == 3 and len(p) < processes for p in model.parameters()):
        return False  # a process would have none of the experts
    return config.hf_quantizer is None and all(
        isinstance(one, _EXPERTS) and (isinstance(one, MergeModulelist) == (one.dim == 0)) for one in operations
    )


def _expect_shares(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Makes DTensors, of which nothing is there yet, of the weights of a model, a head that is new left out."""
    head = model.get_output_embeddings()
    known = {id(p) for part in (model.base_model, head) if part is not None for p in part.parameters()}
    shares = _shares(model, mesh)
    for parameter, places in _places(model):
        if id(parameter) not in known or parameter.dim() == 0:
            continue
        among, placements = shares[parameter]
        size, _ = compute_local_shape_and_global_offset(parameter.shape, among, placements)
        local = torch.empty(size, dtype=parameter.dtype, device="meta")
        share = DTensor.from_local(
            local, among, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        _put(nn.Parameter(share, requires_grad=parameter.requires_grad), places)


def _shares(model: PreTrainedModel, mesh: DeviceMesh) -> dict[nn.Parameter, tuple[DeviceMesh, list[Placement]]]:
    """Among which processes each parameter of a model is divided, and how: as `divide` does it."""
    everyone = mesh if mesh.ndim == 1 else _all(mesh.device_type)
    shares: dict[nn.Parameter, tuple[DeviceMesh, list[Placement]]] = dict.fromkeys(
        model.parameters(), (everyone, [Shard(0)])
    )
    if mesh.ndim == 1:
        return shares
    matrices = divided_dims(model, mesh[_MATRICES].size())
    for layer in blocks_of(model):
        shares |= dict.fromkeys(layer.parameters(), (mesh[_SHARES], [Shard(0)]))
    for parameter, dim in matrices.items():
        rows = Shard(0) if dim else _StridedShard(0, split_factor=mesh[_MATRICES].size())
        shares[parameter] = mesh, [rows, Shard(dim)]
    return shares


class Awaited(nn.Parameter):
    """A weight of which this process has a share: of its shape, type and device, but one number for all."""

    share: DTensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Awaited:
        return memo.setdefault(id(self), _awaited(self.share.clone(), self.requires_grad))


def _awaited(share: DTensor, requires_grad: bool) -> Awaited:
    one = torch.zeros((), dtype=share.dtype, device=share.device)  # on `meta` peft would put adapters there, too
    found = Awaited(one.expand(share.shape), requires_grad)
    found.share = share
    return found


def set_shares_aside(model: nn.Module) -> None:
    """Puts weights without numbers in the place of shares: who makes adapters for DTensors takes their local shapes for
    those of the weights (peft 0.21)."""
    for parameter, places in _places(model):
        if isinstance(parameter, DTensor):
            _put(_awaited(_alone(parameter.detach()), parameter.requires_grad), places)


def _alone(share: DTensor) -> DTensor:
    """A share in memory of its own: as it was read it is a part of the whole weight, which would stay."""
    if (local := share.to_local()).untyped_storage().nbytes() == local.nbytes:
        return share
    return DTensor.from_local(
        local.clone(), share.device_mesh, share.placements, run_check=False, shape=share.shape, stride=share.stride()
    )


def divide(model: nn.Module, mesh: DeviceMesh, compute_in: torch.dtype | None = None) -> None:
    """Divides a model, or a module with models in it; those that it is made of are whole or in shares.

    Embeddings, each layer, the head and whatever else has weights are gathered by themselves when they are run, so it
    does not matter from where they are. Only what a model has outside of its modules needs the whole of it to be run.

    Args:
        compute_in: What gathered weights of models are cast to; a head beside them keeps its type, as does what a model
            says. Gradients are added up in float32.
    """
    if isinstance(model, FSDPModule):
        return
    awaited = [(p, places) for p, places in _places(model) if isinstance(p, Awaited)]
    for parameter, places in awaited:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        _put(nn.Parameter(empty, parameter.requires_grad), places)
    everyone, side_by_side = mesh, mesh
    if mesh.ndim > 1:
        everyone, side_by_side = _all(mesh.device_type), mesh[_SHARES]
        for one in _language_models(model):
            divide_matrices(one, mesh[_MATRICES])
    in_layers = {part for one in _language_models(model) for layer in blocks_of(one) for part in layer.modules()}
    first = [layers[0] for one in _language_models(model) if (layers := blocks_of(one))]
    cast = MixedPrecisionPolicy(param_dtype=compute_in, reduce_dtype=compute_in and torch.float32)
    in_models = {part for one in _language_models(model) for part in one.modules()}
    for group in [*_groups(model), [model]]:  # in a list, because their classes change
        policy = cast if in_models.issuperset(group) else MixedPrecisionPolicy()
        among = side_by_side if in_layers.issuperset(group) else everyone
        fully_shard(group if len(group) > 1 else group[0], mesh=among, mp_policy=policy)
    for parameter, places in awaited:
        _put(nn.Parameter(parameter.share, parameter.requires_grad), places)
    for one in _language_models(model):
        _release_early(one)
    for layer in first:  # gathers itself, which is there already, and not the embeddings that were run before it
        layer.set_modules_to_backward_prefetch([layer])
    model.load_state_dict({}, strict=False)  # FSDP then takes what it finds in its modules
    fully_shard.state(model)._lazy_init()  # else what is run first would be the outermost, also where that is a layer


def _groups(model: nn.Module) -> Iterator[list[nn.Module]]:
    """What is gathered together, the innermost first; what models share once."""
    seen: set[nn.Module] = set()
    for one in _language_models(model):
        layers = [[layer] for layer in blocks_of(one)]
        ends = list(dict.fromkeys(filter(None, (one.get_input_embeddings(), one.get_output_embeddings()))))
        weights = [set(end.parameters()) for end in ends]
        tied = len(ends) == 2 and weights[0] & weights[1]
        for group in [*layers, *([ends] if tied else [[end] for end in ends])]:
            if not seen.intersection(group):
                seen.update(group)
                yield group
    inside = {part for group in seen for part in group.modules()}
    for part in model.modules():
        if part is not model and part not in inside and any(p is not None for p in part._parameters.values()):
            yield [part]


def _release_early(model: PreTrainedModel) -> None:
    """Lets go of what FSDP would hold for longer than it is run: embeddings that are tied to the head from one to the
    other, others from their backward pass to the end of it, and so the first layer where they are not trained."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if head is not None and fully_shard.state(embeddings) is fully_shard.state(head):
        embeddings.register_forward_hook(lambda module, args, output: module.reshard())
    elif isinstance(embeddings, nn.Embedding):
        embeddings.set_unshard_in_backward(False)  # rows are chosen, and a gradient needs but their numbers

    def ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
        if trained and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    embeddings.register_forward_hook(ask_for_gradient)


def _language_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Models of transformers in a module, those left out that are a part of another."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from _language_models(child)


def _places(model: nn.Module) -> list[tuple[nn.Parameter, list[Place]]]:
    """The parameters of a model, each with all the modules that have it."""
    found: dict[int, tuple[nn.Parameter, list[Place]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _put(parameter: nn.Parameter, places: list[Place]) -> None:
    for module, name in places:
        setattr(module, name, parameter)
