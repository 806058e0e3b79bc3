"""Log-probabilities of completions, without the logits of positions nobody asks for. Knows no loss and no trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignctl.engine.head import score_tokens


@torch.no_grad()
def completion_logps(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
) -> list[Tensor]:
    """Natural-log probability of each token of each completion, given its prompt and what came before.

    Args:
        model: A causal language model of transformers, or one wrapped by peft; its mode is left as it is.
        prompts: Token ids, at least one each.
        completions: Token ids.
        batch_size: Sequences per forward pass. They are sorted by length, so little is padded.

    Returns:
        One float32 tensor `[completion length]` on the CPU for each completion, in the order given.
    """
    device = next(model.parameters()).device
    rows = [list(prompt) + list(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    logps: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(rows[index]) for index in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for i, index in enumerate(batch):
            input_ids[i, : len(rows[index])] = torch.tensor(rows[index])
            attention_mask[i, : len(rows[index])] = 1
        hidden = (
            bare(model)
            .base_model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
            .last_hidden_state
        )
        for i, index in enumerate(batch):
            first = len(prompts[index]) - 1  # the position that predicts the completion's first token
            length = len(completions[index])
            targets = torch.tensor(list(completions[index]), device=device)
            logps[index] = score_tokens(bare(model), hidden[i, first : first + length], targets).logps.cpu()
    return logps


def bare(model: nn.Module) -> nn.Module:
    """The model of transformers inside a wrapper of peft; adapters stay active, because they live in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
