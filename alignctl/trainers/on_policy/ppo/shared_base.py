"""`sharing=shared_base`: policy, value model and reward model are adapters of one frozen base, which with none of them
is the reference."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from alignctl.engine.forward import bare
from alignctl.engine.layout import Layout
from alignctl.engine.rewards import score_layout
from alignctl.models.adapters import Adapters, ScoreAdapter
from alignctl.trainers.on_policy.ppo.models import ValueHead

_VALUE, _REWARD = "value_model", "reward_model"


class AdapterModel(nn.Module):
    """The shared model under one of its adapters, with a head: used as a sequence classifier is.

    Only the head is a part of this module; the adapter is among the weights of the shared model.
    """

    def __init__(self, adapters: Adapters, name: str, pad_token_id: int):
        super().__init__()
        self._adapters, self.name = adapters, name
        self.config = copy.deepcopy(adapters.model.config)
        self.config.get_text_config().pad_token_id = pad_token_id
        self.score = ValueHead(self.config.get_text_config().hidden_size, adapters.model.device)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    @property
    def packed_attention(self) -> str | None:
        return getattr(bare(self._adapters.model), "packed_attention", None)

    def base_model(self, **inputs: Any) -> Any:
        with self._adapters.under(self.name):
            return bare(self._adapters.model).base_model(**inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SequenceClassifierOutput:
        """Scores `[batch, 1]` of rows padded on the right."""
        where = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
        layout = Layout(input_ids, where, attention_mask=attention_mask)
        return SequenceClassifierOutput(logits=score_layout(self, layout, input_ids))

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [one for key, one in self._adapters.model.named_parameters() if self.name in key.split(".")]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Of the shared model, so that what is computed again is computed under the adapter it was computed under."""
        self._adapters.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=(activation_checkpointing_kwargs or {})
            | {"use_reentrant": False, "context_fn": self._adapters.checkpoint_contexts},
            **options,
        )


def share_base(
    policy: PeftModel, reward: ScoreAdapter | None, pad_token_id: int
) -> tuple[AdapterModel, AdapterModel | None]:
    """Value model and reward model as adapters beside the policy's, which stays the active one.

    The value model starts as the reward model; where there is none, with an adapter like the policy's and a head that
    says 0.
    """
    names = [_VALUE, _REWARD] if reward else [_VALUE]
    for name in names:
        if reward:
            reward.put_on(policy, name)
        else:
            like_the_policy_s = replace(
                policy.peft_config["default"],
                modules_to_save=None,
                trainable_token_indices=None,
                init_lora_weights=True,
            )
            policy.add_adapter(name, like_the_policy_s)
    adapters = Adapters(policy)
    models = [AdapterModel(adapters, name, pad_token_id) for name in names]
    for model in models:
        for parameter in model.adapter_parameters():
            parameter.requires_grad_(model.name == _VALUE)
        if reward:
            model.score.load_state_dict({"bias": torch.zeros(1)} | reward.head)
    return models[0], models[1] if reward else None
