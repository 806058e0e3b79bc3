"""What is computed in, where mixed precision says so."""

from __future__ import annotations

import torch
from transformers import TrainingArguments


def mixed_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The type of mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
