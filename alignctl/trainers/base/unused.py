"""Whether every trained weight has a gradient in every pass. DDP waits for each of them, unless it is told to look for
those that have none; looking costs a walk through the graph and a collective a step, and is mostly for nothing."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import PretrainedConfig

from alignctl.engine.forward import evaluating

_BY_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_TOKENS = 8


class LooksForUnused:
    """Mixin before a transformers Trainer: DDP looks for weights without a gradient only where there may be some, which
    a try of a few tokens says, the same in every process. `ddp_find_unused_parameters` decides where it is given.

    A trainer has `tried_outputs(model, ids)`: what a loss would be made of, for token ids `[2, length]`, which are a
    pair to those that take pairs.
    """

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        accelerator, wanted = self.accelerator, self.args.ddp_find_unused_parameters
        if accelerator.distributed_type in _BY_DDP and accelerator.ddp_handler is not None and wanted is None:
            accelerator.ddp_handler.find_unused_parameters = self._may_leave_unused()
        return super()._prepare_for_training(*args, **kwargs)

    def _may_leave_unused(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        if any(_chooses_experts(one.config) for one in model.modules() if hasattr(one, "config")):
            return True  # those that no token of a pass is sent to may have none
        config = self.trained_model.config.get_text_config()
        ids = torch.arange(1, _TOKENS + 1, device=self.args.device).expand(2, -1) % config.vocab_size
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        with evaluating(model), self.accelerator.autocast(), torch.random.fork_rng(devices=[]):
            loss = sum(output.float().sum() for output in self.tried_outputs(model, ids))
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return any(gradient is None for gradient in gradients)


def _chooses_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts."""
    if not isinstance(config, PretrainedConfig):
        return False
    numbers = vars(config.get_text_config()).items()
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in numbers)
