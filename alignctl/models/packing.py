"""Teaches models of transformers to take packed rows (engine/layout.py), through its attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignctl.engine.attention import sdpa_by_parts
from alignctl.engine.forward import evaluating, has_all_weights, last_hidden, takes_packed_rows
from alignctl.engine.layout import Layout, pack
from alignctl.errors import RequestError

_PREFIX = "alignctl_"
_TOLERANCE, _TOLERANCE_16 = 1e-4, 3e-2  # of hidden states, relative; 16 bits are rounded more


def put_packed_attention_on(model: PreTrainedModel, device: torch.device) -> str | None:
    """Lets a model take packed rows besides padded ones, which it computes as before.

    Args:
        device: Where the model will run; it may not be there yet.

    Returns:
        None, or why the model cannot take them; it is then left as it was.
    """
    if takes_packed_rows(model):
        return None
    reason = _why_not(model)
    before = model.config._attn_implementation
    for kernel in [] if reason else _kernels(model, device):
        model.set_attn_implementation(_PREFIX + kernel)
        reason = _try_out(model)
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


def _kernels(model: PreTrainedModel, device: torch.device) -> list[str]:
    """Kernels that this machine and model can run, the fastest first."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    flex = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and width >= 16
    return ["flex", "sdpa"] if flex else ["sdpa"]


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> str | None:
    """Runs three short sequences, packed and by themselves; says what is wrong with the outcome."""
    if not has_all_weights(model):
        return None
    ids = torch.arange(4, 24) % model.config.get_text_config().vocab_size
    sequences = [ids[:9], torch.cat([ids[:5], ids[10:16]]), ids[12:20]]
    layout = pack(sequences, [(0, 1), (2,)], model.device)
    try:
        with evaluating(model):
            packed = last_hidden(model, layout)
            for number, sequence in enumerate(sequences):
                alone = model.base_model(input_ids=sequence[None].to(model.device), use_cache=False)
                alone = alone.last_hidden_state[0]
                if not alone.isfinite().all():
                    raise RequestError(
                        "the model cannot be trained: what it computes is not finite", "look at its weights"
                    )
                error = (packed[layout.where[number, : len(sequence)]] - alone).norm() / alone.norm()
                if not error < (_TOLERANCE if alone.dtype.itemsize >= 4 else _TOLERANCE_16):
                    kind = model.config.model_type
                    return f"models of type `{kind}` do not compute packed rows as they do single ones"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = repr(error).partition("\\n")[0]
        return f"models of type `{model.config.model_type}` do not take packed rows: {reason}"
    return None


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    _refuse(options)
    return sdpa_by_parts(query, key, value, layout, scaling, dropout).transpose(1, 2).contiguous(), None


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    # FlexAttention has no dropout, and no gradient on a CPU.
    if layout is None or options.get("dropout") or not query.is_cuda:
        return _sdpa(module, query, key, value, attention_mask, layout=layout, **options)
    _refuse(options)
    return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=options.get("scaling"))


def _refuse(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"`{name}` in its attention is not known")


for _kernel, _forward in {"sdpa": _sdpa, "flex": _flex}.items():
    AttentionInterface.register(_PREFIX + _kernel, _forward)
    AttentionMaskInterface.register(_PREFIX + _kernel, sdpa_mask)
