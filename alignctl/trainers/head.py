"""Puts alignctl's chunked LM head under TRL's trainers, in place of their own.

TRL's trainers call `model(..., labels=, fused_lm_head=True)` and read per-token scores from what comes back. Their head
works in tiles that take gigabytes on a CPU and scores positions nobody asks for there; engine/head.py does neither.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from alignctl.engine.head import score_tokens
from alignctl.engine.logps import bare


class ChunkedHead:
    """A mixin for TRL's trainers of policies. Mixture-of-experts models keep TRL's head, which knows their own loss."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._put_heads_on()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._put_heads_on()  # TRL calls this while it is being built
        return super()._precompute_ref_logps(*args, **kwargs)

    def _put_heads_on(self) -> None:
        if not self.aux_loss_enabled:
            for model in (self.model, getattr(self, "ref_model", None)):
                if model is not None:
                    _put_head_on(bare(self.accelerator.unwrap_model(model)))


def _put_head_on(model: nn.Module) -> None:
    """Lets a causal language model answer `fused_lm_head=True`; its forward is otherwise as it was."""
    if getattr(model, "_has_chunked_head", False):
        return
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return plain(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        scores = score_tokens(self, hidden[mask], targets[mask])

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        fields = {name: spread(values) for name, values in scores._asdict().items()}
        logps = fields.pop("logps")
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-logps.sum() / count, log_probs=logps, label_mask=mask, **fields)

    model.forward = types.MethodType(forward, model)
    model._has_chunked_head = True
