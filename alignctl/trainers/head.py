"""Puts alignctl's chunked LM head under TRL's trainers, in place of their own.

TRL's trainers call `model(..., labels=, fused_lm_head=True)` and read per-token scores from what comes back. Their head
works in tiles that take gigabytes on a CPU and scores positions nobody asks for there; engine/head.py does neither.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from alignctl.engine.head import score_tokens
from alignctl.engine.logps import bare
from alignctl.errors import RequestError

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # nats; 16 bits are rounded more
_TOLERANCE_16 = 0.1


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
                    _put_head_on(bare(self.accelerator.unwrap_model(model)), self.accelerator.autocast)


def _put_head_on(model: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> None:
    """Lets a causal language model answer `fused_lm_head=True`; its forward is otherwise as it was.

    Args:
        autocast: Mixed precision of the run. accelerate wraps it around a model's forward, a reference's before this
            takes the forward's place.
    """
    if getattr(model, "_has_chunked_head", False):
        return
    _check_head(model)
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
        targets = labels[:, 1:]
        mask = targets != -100
        with autocast():
            hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
            scores = score_tokens(self, hidden[mask], targets[mask], statistics=True)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        fields = {name: spread(values) for name, values in scores._asdict().items()}
        logps = fields.pop("logps")
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-logps.sum() / count, log_probs=logps, label_mask=mask, **fields)

    model.forward = types.MethodType(forward, model)
    model._has_chunked_head = True


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """A few tokens scored by our head and by the model's own logits.

    Raises:
        RequestError: They differ: the architecture does something between its layers and its logits that we do not.
    """
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return  # shards of ZeRO-3: they cannot be run yet
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        found = None if hidden is None else score_tokens(model, hidden[0, :-1], ids[0, 1:]).logps
    finally:
        model.train(was_training)
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_16)
    if found is None or not torch.allclose(found, expected.to(found.dtype), rtol=0, atol=tolerance):
        kind = model.config.model_type
        raise RequestError(
            f"models of type `{kind}` compute their logits in a way that alignctl does not know, so log-probabilities "
            "would be wrong",
            "use another model, or open an issue that names this one",
        )
