"""The policy with its value model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignctl.engine.forward import bare, last_hidden
from alignctl.trainers.on_policy.models import Batch, PolicyModel


class ValueHead(nn.Linear):
    """One number for a hidden state, 0 at first, in float32: 16 bits are too coarse for values."""

    def __init__(self, width: int, device: torch.device):
        super().__init__(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


class ActorCritic(PolicyModel):
    """The policy, and a value model or a value head on the policy's last hidden states."""

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: nn.Module | None,
        value_mean: float = 0.0,
        value_std: float = 1.0,
    ):
        """`value_mean` and `value_std` are taken from the value model's outputs, where the rewards are scaled so."""
        super().__init__(policy)
        self.value_model = value_model
        self.value_mean, self.value_std = value_mean, value_std
        if value_model is None:
            self.value_head = ValueHead(policy.config.get_text_config().hidden_size, policy.device)

    @property
    def models(self) -> Mapping[str, nn.Module]:
        both = {"model": self.policy, "value model": self.value_model}
        return {name: model for name, model in both.items() if model is not None}

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """Without those of a value model that is an adapter beside the policy's."""
        others = set(self.value_model.adapter_parameters()) if hasattr(self.value_model, "adapter_parameters") else ()
        return [parameter for parameter in self.policy.parameters() if parameter not in others]

    def values(self, hidden: Tensor, batch: Batch, policy_learns: bool) -> tuple[Tensor, Tensor]:
        places = torch.cat([batch.before, batch.last])
        if self.value_model is None:
            values = self.value_head(hidden[places] if policy_learns else hidden[places].detach())
        else:
            values = bare(self.value_model).score(last_hidden(self.value_model, batch.layout)[places]).float()
            values = (values - self.value_mean) / self.value_std
        before, last = values.squeeze(-1).split([len(batch.before), len(batch.last)])
        return before, last
