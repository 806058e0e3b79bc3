"""Puts alignctl's engine under models that TRL's trainers call, in place of their own heads.

TRL's trainers of policies call `model(..., labels=, fused_lm_head=True)` and read per-token scores from what comes
back; that of reward models calls `model(...)` and reads one score a row. Both give batches padded on the right.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from alignctl.engine.forward import evaluating, has_all_weights, last_hidden, takes_packed_rows
from alignctl.engine.head import score_tokens
from alignctl.engine.layout import Layout, pack_rows, packed_already, pad
from alignctl.engine.rewards import score_layout
from alignctl.errors import RequestError

Autocast = Callable[[], AbstractContextManager[None]]

# What says nothing about the rows, and what TRL gives besides to models that need it: here the layout says the same.
_SAID_OTHERWISE = {
    "use_cache", "return_dict", "margin", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
}  # fmt: skip
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # nats; 16 bits are rounded more
_TOLERANCE_16 = 0.1


def put_head_on(
    model: nn.Module,
    autocast: Autocast,
    blocks: int = 1,
    statistics: bool = True,
    has_reference: bool = False,
) -> None:
    """Lets a causal language model answer `fused_lm_head=True`; its forward is otherwise as it was.

    Args:
        autocast: Mixed precision of the run. accelerate wraps it around a model's forward, a reference's before this
            takes the forward's place.
        blocks: Of rows of a batch whose first rows share a prompt, and so on: 2 for pairs.
        statistics: Whether the trainer logs more of this model's tokens than comes of their log-probabilities.
        has_reference: Whether log-probabilities alone are what it computes in training without a gradient, with its
            adapters switched off.
    """
    _check_head(model)
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return plain(*args, **inputs, **{key: value for key, value in given.items() if value is not None})
        targets = labels[:, 1:]
        mask = targets != -100
        refers = has_reference and self.training and not torch.is_grad_enabled()
        with autocast():
            hidden = _hidden_before(self, mask, blocks, *args, **inputs)
            scores = score_tokens(self, hidden, targets[mask], statistics=statistics and not refers)

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

        fields = {name: spread(values) for name, values in scores._asdict().items()}
        logps = fields.pop("logps")
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-logps.sum() / count, log_probs=logps, label_mask=mask, **fields)

    model.forward = types.MethodType(forward, model)


def put_score_on(model: nn.Module, autocast: Autocast, blocks: int = 1) -> None:
    """Lets a sequence classifier that takes packed rows compute a trainer's batches in them; arguments as above."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        layout = None if args else _packed(inputs, blocks)
        if layout is None:
            return plain(*args, **inputs)
        with autocast():
            logits = score_layout(self, layout, inputs["input_ids"])
        return SequenceClassifierOutputWithPast(logits=logits)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def why_not_scored_packed(model: nn.Module) -> str | None:
    """None for a sequence classifier that scores a row by a layer `score` over its last token, else the reason."""
    kind = f"models of type `{model.config.model_type}`"
    if not hasattr(model, "score"):
        return f"{kind} do not score a single token"
    if not _can_be_tried(model):
        return None
    ids = _few_tokens(model)
    with evaluating(model):
        expected = type(model).forward(model, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = score_layout(model, pad([ids[0].cpu()], device=model.device), ids)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_16)
    return None if torch.allclose(found, expected, rtol=1e-2, atol=tolerance) else f"{kind} score rows in another way"


def _hidden_before(model: nn.Module, mask: Tensor, blocks: int, *args: Any, **inputs: Any) -> Tensor:
    """Last hidden states `[tokens, width]` of the positions before those of a mask `[batch, length - 1]`."""
    layout = _packed(inputs, blocks) if takes_packed_rows(model) and not args else None
    if layout is None:
        return model.base_model(*args, **inputs | {"use_cache": False}).last_hidden_state[:, :-1][mask]
    return last_hidden(model, layout)[layout.where[:, :-1][mask]]


def _packed(inputs: dict[str, Any], blocks: int) -> Layout | None:
    """A batch of a trainer in one row; None where it holds more than text."""
    given = {name for name, value in inputs.items() if value is not None} - _SAID_OTHERWISE
    if given == {"input_ids", "attention_mask"}:
        return pack_rows(inputs["input_ids"], inputs["attention_mask"], blocks)
    if given == {"input_ids", "position_ids"} and len(inputs["input_ids"]) == 1:
        return packed_already(inputs["input_ids"], inputs["position_ids"])
    return None


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """A few tokens scored by our head and by the model's own logits.

    Raises:
        RequestError: They differ: the architecture does something between its layers and its logits that we do not. Or
            they are no numbers.
    """
    if not _can_be_tried(model):
        return
    ids = _few_tokens(model)
    with evaluating(model):
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        found = None if hidden is None else score_tokens(model, hidden[0, :-1], ids[0, 1:]).logps
        same = found is not None and _as_by_itself(found, model, ids)
    if not same:
        kind = model.config.model_type
        raise RequestError(
            f"models of type `{kind}` compute their logits in a way that alignctl does not know, so log-probabilities "
            "would be wrong",
            "use another model, or open an issue that names this one",
        )


@torch.no_grad()
def check_head_of_trl(model: nn.Module) -> None:
    """A few tokens scored by TRL's head, which a mixture of experts keeps, and by the model's own logits.

    Raises:
        RequestError: They differ, or TRL (1.16) does not find in the model what its load balancing takes.
    """
    if not _can_be_tried(model):
        return
    ids = _few_tokens(model)
    mask = torch.ones_like(ids)
    with evaluating(model):
        try:
            found = model(
                input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, output_router_logits=True
            ).log_probs[0]
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            found = None
        same = found is not None and _as_by_itself(found, model, ids)
    if not same:
        kind = model.config.model_type
        raise RequestError(
            f"TRL does not know the mixture of experts of models of type `{kind}`, so it cannot balance their load",
            "leave that out, `router_aux_loss_coef=0.0` of the stage, or use another model",
        )


def _can_be_tried(model: nn.Module) -> bool:
    """Whether there are weights to run a model with: whole ones, or such as FSDP2 gathers."""
    return has_all_weights(model) or any(isinstance(one, FSDPModule) for one in model.modules())


def _few_tokens(model: nn.Module) -> Tensor:
    """Token ids `[1, 8]` to try a head with."""
    return torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size


def _as_by_itself(found: Tensor, model: nn.Module, ids: Tensor) -> bool:
    """Whether log-probabilities `[length - 1]` of all tokens but the first are those of the model's own logits.

    Raises:
        RequestError: Those are no numbers.
    """
    with evaluating(model):
        # The class's own forward: that of the model may be in mixed precision already.
        logits = type(model).forward(model, input_ids=ids, use_cache=False).logits[0, :-1].float()
    if not logits.isfinite().all():
        raise RequestError("the model cannot be trained: its logits are not finite", "look at its weights")
    expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_16)
    return torch.allclose(found, expected.to(found.dtype), rtol=0, atol=tolerance)
