"""Which matrices of a model several processes divide among them, as transformers says it of each architecture."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from alignctl.engine.tensor_parallel import Entry, give_columns, look_at_own_heads, take_columns
from alignctl.errors import RequestError

_GIVES, _TAKES, _OWN_HEADS = "colwise", "rowwise", "replicated_with_grad_allreduce"


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, each of which is gathered by itself."""
    names = set(model._no_split_modules or ())
    return [layer for layer in model.modules() if type(layer).__name__ in names]


def divided_dims(model: PreTrainedModel, processes: int) -> dict[nn.Parameter, int]:
    """The matrices of a model's layers that so many processes divide, and biases with them, each with the dimension by
    which they do. Embeddings and the head are not among them.

    Raises:
        RequestError: They cannot be.
    """
    dims: dict[nn.Parameter, int] = {}
    for _, module, style in _styles(model, processes):
        if style == _GIVES:
            dims |= dict.fromkeys((p for p in (module.weight, module.bias) if p is not None), 0)
        elif style == _TAKES:
            dims[module.weight] = 1
    return dims


def divide_matrices(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leaves of the matrices of a model's layers what is this process's, and has them computed together. They are whole
    in all processes, or have no numbers yet.

    Args:
        mesh: Of the processes that divide them.

    Raises:
        RequestError: They cannot be divided.
    """
    group, entries = mesh.get_group(), {}
    for name, module, style in _styles(model, mesh.size()):
        if style == _GIVES:
            give_columns(module, entries.setdefault(name.rpartition(".")[0], Entry(group)))
            _divide(module, "weight", 0, mesh)
            _divide(module, "bias", 0, mesh)
        elif style == _TAKES:
            take_columns(module, group)
            _divide(module, "weight", 1, mesh)
        else:
            look_at_own_heads(module, group)
    model.weights_group = group


def _divide(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole: Tensor | None = getattr(module, name)
    if whole is not None:
        own: DTensor = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
        setattr(module, name, nn.Parameter(own, requires_grad=whole.requires_grad))


def _styles(model: PreTrainedModel, processes: int) -> list[tuple[str, nn.Module, str]]:
    """The modules in a model's layers that processes divide, or use for their own heads, with their names and how.

    Raises:
        RequestError: They cannot.
    """
    plan, inside = dict(model._tp_plan or {}), {part for layer in blocks_of(model) for part in layer.modules()}
    found = [(name, module, replace_layer_number_by_wildcard(name)) for name, module in model.named_modules()]
    found = [(name, module, plan[key]) for name, module, key in found if key in plan and module in inside]
    if reason := _why_not(model, found, processes):
        raise RequestError(
            f"`distributed.parallelism_config.tp_size={processes}` cannot be: {reason}",
            "leave it out: `distributed=fsdp2` divides weights without it, too",
        )
    return found


def _why_not(model: PreTrainedModel, found: list[tuple[str, nn.Module, str]], processes: int) -> str | None:
    config, kind = model.config.get_text_config(), f"models of type `{model.config.model_type}`"
    plan = model._tp_plan or {}
    alone = (plan.get(replace_layer_number_by_wildcard(name)) for name, _ in model.named_parameters())
    unknown = [style for style in alone if style]  # of weights that are in no module of their own
    unknown += [style for _, module, style in found if style != _OWN_HEADS and type(module) is not nn.Linear]
    unknown += [style for *_, style in found if style not in (_GIVES, _TAKES, _OWN_HEADS)]
    if unknown:
        return f"layers of {kind} are divided in a way that alignctl does not know (`{unknown[0]}`)"
    if beside := _beside(model, found):
        return f"layers of {kind} have other weights between their matrices (`{beside[0]}`)"
    if not found:
        return f"transformers does not say how the layers of {kind} are divided"
    for _, module, style in found:
        size = {_GIVES: "out_features", _TAKES: "in_features"}.get(style)
        if size and getattr(module, size) % processes:
            return f"it does not divide the {getattr(module, size)} columns between two matrices of a layer"
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (getattr(config, key, None) or 0) % processes:
            return f"it does not divide the heads of the model, {getattr(config, key)} (`{key}`)"
    return None


def _beside(model: PreTrainedModel, found: list[tuple[str, nn.Module, str]]) -> list[str]:
    """Weights of attention and what follows it that all processes would have whole: each would see but its own columns,
    and find a part of their gradient."""
    known = {module for _, module, _ in found}
    parents = dict.fromkeys(name.rpartition(".")[0] for name, *_ in found)
    return [
        f"{name}.{parameter}".removeprefix(f"{parent}.")
        for parent in parents
        for name, module in model.get_submodule(parent).named_modules(prefix=parent)
        for parameter, weight in module._parameters.items()
        if weight is not None and module not in known
    ]
