"""How does the engine compute each family of models? Makes a tiny one of each, with random weights, and asks.

    python scripts/families.py          # what docs/engine.md has
    python scripts/families.py cuda     # on the GPU of this machine

bench_preference.py prints the same with `--families`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignctl.models.packing import put_packed_attention_on

SIZE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Models of one architecture."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    """What the published configs say beside sizes, as far as it decides anything here."""
    of: tuple[str, ...] = ()
    """Ids in conf/model."""


FAMILIES = (
    Family(
        "Llama 3, SmolLM 2",
        "llama",
        of=(
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    ),
    Family("Qwen 2.5", "qwen2"),
    Family("Qwen 3", "qwen3", of=("Qwen/Qwen3-8B",)),
    Family("Mistral from v0.2 on", "mistral", {"sliding_window": None}, ("mistralai/Mistral-7B-Instruct-v0.3",)),
    Family("Mistral v0.1", "mistral", {"sliding_window": 4096}),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", of=("google/gemma-2-9b-it",)),
    Family("Gemma 3", "gemma3_text"),
    Family("Phi 4", "phi3", {"sliding_window": None}),
    Family("OLMo 2", "olmo2"),
    Family("Granite 3", "granite"),
    Family("Mixtral", "mixtral", {"sliding_window": None, "num_local_experts": 2}),
    Family("GPT-OSS", "gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
)


def table(device: str) -> str:
    """How the rows of each family are computed on a device, in Markdown."""
    lines = ["| models | type | rows |", "|---|---|---|"]
    for family in FAMILIES:
        model = make(family).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
        reason = put_packed_attention_on(model, torch.device(device))
        rows = f"padded: {reason}" if reason else f"packed, {model.packed_attention} attention"
        lines.append(f"| {family.name} | `{family.model_type}` | {rows} |")
    return "\n".join(lines)


def make(family: Family) -> PreTrainedModel:
    """A tiny model of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **SIZE | family.settings)
    return AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    print(table(*sys.argv[1:] or ["cpu"]))
