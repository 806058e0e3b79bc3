"""LoRA's product on a CPU, with the same outcome as peft's but for rounding, faster.

A rank of 8 makes matrices so thin that the order in which a product is written decides how fast it is: MKL takes up to
ten times as long for `[2048, 352] x [352, 8]` as for its transpose. And peft's scaling and sum go through the whole
output twice more, forward and backward. Without either PPO's update takes a sixth less for a width of 768.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


def make_lora_fast(model: nn.Module) -> None:
    """Computes the plain LoRA layers of a model otherwise, adapters that are added later included; others, and what is
    not on a CPU, stay peft's."""
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = _FastLinear


class _FastLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        name = None if args or options else self._plain_adapter(x)
        if name is None:
            return super().forward(x, *args, **options)
        base = self.base_layer
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, base.weight, base.bias, first, second, self.scaling[name])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one active adapter, where it and what is under it are of the plain kind."""
        names = self.active_adapters
        if x.is_cuda or self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return None
        (name,), base = names, self.base_layer
        first, second, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        plain = type(base) is nn.Linear and name not in self.lora_variant and second.bias is None
        drops = dropout.training and getattr(dropout, "p", 0) > 0
        if not plain or drops or base.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return None
        weights = (base.weight, first.weight, second.weight)  # of one dimension where ZeRO-3 has divided them
        return name if all(w.dtype == x.dtype and w.ndim == 2 for w in weights) else None


class _LoraProduct(torch.autograd.Function):
    """x W' + b + scaling x A' B' for frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        inner = first @ rows.t()  # [rank, rows]
        ctx.save_for_backward(rows, weight, first, second, inner)
        ctx.scaling = scaling
        out = F.linear(rows, weight, bias).addmm_(inner.t(), second.t(), alpha=scaling)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        rows, weight, first, second, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.size(-1))
        of_inner = (second.t() @ flat.t()).mul_(ctx.scaling)
        of_x = of_first = of_second = None
        if ctx.needs_input_grad[0]:
            of_x = (flat @ weight).addmm_(of_inner.t(), first).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            of_first = of_inner @ rows
        if ctx.needs_input_grad[4]:
            of_second = (inner @ flat).mul_(ctx.scaling).t()
        return of_x, None, None, of_first, of_second, None
