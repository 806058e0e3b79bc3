"""Teaches models of transformers to take packed rows (engine/layout.py), through its attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignctl.engine.attention import by_spans, flash, joined, sdpa_by_parts
from alignctl.engine.forward import evaluating, has_all_weights, last_hidden, takes_packed_rows
from alignctl.engine.layout import Layout, pack
from alignctl.engine.row_group import all_heads, some_heads
from alignctl.errors import RequestError

_PREFIX = "alignctl_"
_NAMES = {"sdpa": "alignctl_sdpa", "flex": "alignctl_flex", "flash": "alignctl_spans"}
"""For transformers (5.23), which takes every name with `flash` in it for a package of its own."""
_TOLERANCE, _TOLERANCE_16 = 1e-4, 3e-2  # of hidden states, relative; 16 bits are rounded more
_FLASH_WIDTHS = range(16, 193, 8)
"""Head sizes whose gradient every card has from compute capability 8.0 on."""


def put_packed_attention_on(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """Lets a model take packed rows besides padded ones, which it computes as before.

    Args:
        device: Where the model will run; it may not be there yet.
        dtype: In which it will be computed, where mixed precision makes that another one than of its weights.

    Returns:
        None, or why the model cannot take them; it is then left as it was.
    """
    if takes_packed_rows(model):
        return None
    reason = _why_not(model)
    before = model.config._attn_implementation
    dtype = dtype or model.dtype
    for kernel in [] if reason else _kernels(model, device, dtype):
        model.set_attn_implementation(_NAMES[kernel])
        reason = _try_out(model, dtype)
        if reason is None:
            model.packed_attention = kernel
            return None
        model.set_attn_implementation(before)
    return reason


def _why_not(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kind = f"models of type `{model.config.model_type}`"
    if config is not model.config:
        return f"{kind} are not for text alone"
    if not model._supports_attention_backend:
        return f"the attention of {kind} cannot be replaced"
    layers = getattr(config, "layer_types", None)
    if layers and set(layers) != {"full_attention"}:
        return f"{kind} have layers that do not look at the whole text ({', '.join(sorted(set(layers)))})"
    if not layers and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"{kind} look at a window of {config.sliding_window} tokens"
    attention = model.config._attn_implementation
    if attention != "sdpa" and not attention.startswith(_PREFIX):  # a config may be shared with a model that has ours
        return f"the attention of this model is `{attention}`"
    return None


def _kernels(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Kernels that this machine and model can run, the fastest first."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kernels = ["sdpa"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        if width >= 16:
            kernels.insert(0, "flex")
        # How AMD's kernel aligns its mask has not been tried.
        if width in _FLASH_WIDTHS and dtype.itemsize == 2 and torch.version.hip is None:
            kernels.insert(0, "flash")
    return kernels


@torch.no_grad()
def _try_out(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Runs three short sequences, packed and by themselves; says what is wrong with the outcome."""
    if not has_all_weights(model):
        return None
    ids = torch.arange(4, 24) % model.config.get_text_config().vocab_size
    sequences = [ids[:9], torch.cat([ids[:5], ids[10:16]]), ids[12:20]]
    layout = pack(sequences, [(0, 1), (2,)], model.device)
    mixed = model.device.type == "cuda" and dtype != model.dtype  # elsewhere it changes no kernel
    tolerance = _TOLERANCE_16 if mixed or model.dtype.itemsize < 4 else _TOLERANCE
    try:
        with evaluating(model), torch.autocast(model.device.type, dtype, enabled=mixed):
            packed = last_hidden(model, layout)
            for number, sequence in enumerate(sequences):
                alone = model.base_model(input_ids=sequence[None].to(model.device), use_cache=False)
                alone = alone.last_hidden_state[0]
                if not alone.isfinite().all():
                    raise RequestError(
                        "the model cannot be trained: what it computes is not finite", "look at its weights"
                    )
                error = (packed[layout.where[number, : len(sequence)]] - alone).norm() / alone.norm()
                if not error < tolerance:
                    kind = model.config.model_type
                    return f"models of type `{kind}` do not compute packed rows as they do single ones"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = repr(error).partition("\\n")[0]
        return f"models of type `{model.config.model_type}` do not take packed rows: {reason}"
    return None


def keep_out_of_graphs() -> None:
    """Lets torch.compile leave the kernels for packed rows alone: every layout would be a graph of its own."""
    for kernel, packed in _PACKED.items():
        if not hasattr(packed, "_torchdynamo_orig_callable"):
            _PACKED[kernel] = torch.compiler.disable(packed)


def _packed_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    # Meta tensors stand for what a GPU would hold, which is as much.
    if query.device.type in ("cpu", "meta") and not dropout and query.size(-1) == value.size(-1):
        # Autocast does not know the kernel, and rotary embeddings of float32 leave queries and keys in float32.
        attended = joined(query.to(value.dtype), key.to(value.dtype), value, layout, scale)
    else:
        attended = sdpa_by_parts(query, key, value, layout, scale, dropout)
    return attended.transpose(1, 2).contiguous()


def _packed_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    # FlexAttention has no dropout, and no gradient on a CPU.
    if dropout or not query.is_cuda:
        return _packed_sdpa(module, query, key, value, layout, scale, dropout)
    return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=scale)[0]


def _packed_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if dropout or device != "cuda" or dtype.itemsize != 2:
        return _packed_flex(module, query, key, value, layout, scale, dropout)
    # Autocast does not know this kernel either.
    query, key, value = (one.to(dtype) for one in (query, key, value))
    return by_spans(query, key, value, layout, scale, flash).transpose(1, 2)


_PACKED = {"sdpa": _packed_sdpa, "flex": _packed_flex, "flash": _packed_flash}


@torch.compiler.disable
def _by_all(
    packed: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float | None,
    dropout: float,
    group: ProcessGroup,
) -> Tensor:
    """What a kernel gives for a row that a group of processes compute together."""
    query, key, value = (some_heads(one, group) for one in (query, key, value))
    return all_heads(packed(module, query, key, value, layout, scale, dropout), group)


def _attention(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    """What transformers calls: a kernel for packed rows, and its own SDPA for the others."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Layout | None = None,
        row_group: ProcessGroup | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if layout is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
            )
        _refuse(options)
        if row_group is None:
            return _PACKED[kernel](module, query, key, value, layout, scaling, dropout), None
        return _by_all(_PACKED[kernel], module, query, key, value, layout, scaling, dropout, row_group), None

    return forward


def _refuse(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"`{name}` in its attention is not known")


for _kernel, _name in _NAMES.items():
    AttentionInterface.register(_name, _attention(_kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
