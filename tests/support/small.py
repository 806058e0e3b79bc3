"""Small trainers in this process: a Llama of a few thousand parameters and rows of the quickstart world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from alignctl.data.converters import unpair
from alignctl.data.quickstart import demonstrations, preferences
from alignctl.methods.registry import methods, resolve
from alignctl.models.tokenizer import train_tokenizer


@dataclass
class Small:
    """Builds the trainer of any method over one small model."""

    folder: Any
    tokenizer: Any = field(init=False)

    def __post_init__(self):
        texts = [m["content"] for row in preferences("train")[:200] for part in row.values() for m in part]
        self.tokenizer = train_tokenizer(texts, 400)

    @staticmethod
    def rows(kind: str, count: int = 8) -> Dataset:
        """Rows of the quickstart world of a kind; of feedback twice as many."""
        if kind == "demonstrations":
            return Dataset.from_list(demonstrations("train")[:count])
        pairs = preferences("train")[:count]
        return Dataset.from_list(pairs if kind == "preferences" else [one for pair in pairs for one in unpair(pair)])

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip

    @property
    def model(self) -> LlamaForCausalLM:
        """The same weights every time."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config())

    def reward_model(self):
        torch.manual_seed(0)
        config = self.config()
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config)

    def arguments(self, config_class: Any, **settings: Any) -> Any:
        defaults = {"per_device_train_batch_size": 8, "bf16": False, "report_to": "none", "use_cpu": True}
        return config_class(output_dir=str(self.folder), **defaults | settings)

    def trainer(self, name: str, trainer: Any = None, model: Any = None, rows: Dataset | None = None,
                held: Dataset | None = None, keeps_batches: str | None = None, **settings: Any):  # fmt: skip
        """The trainer of a method, or another that takes the same arguments; `held` are held-out rows."""
        method = methods()[name]
        model = model or (self.model if method.trained == "policy" else self.reward_model())
        roles = {"ref_model": self.model} if "reference" in method.roles else {}
        return (trainer or resolve(method.trainer))(
            model=model,
            args=self.arguments(resolve(method.config_class), **settings),
            train_dataset=rows or self.rows(method.data_kind),
            eval_dataset=held,
            processing_class=self.tokenizer,
            **({"keeps_batches": keeps_batches} if keeps_batches else {}),
            **roles,
        )
