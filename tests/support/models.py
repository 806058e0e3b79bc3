"""Models so small that a run of one is mostly imports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TINY = (
    "model.scratch.vocab_size=400", "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=64",
)  # fmt: skip
"""Settings of the quickstart recipes."""

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
"""Of a config, for most types of models."""


def tiny(model_type: str = "llama", **options: Any) -> PreTrainedModel:
    """A language model with the same random weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZE | options)).eval()


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """All weights as one vector."""
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
