"""Log-probabilities of completions, without the logits of positions nobody asks for. Knows no loss and no trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignctl.engine.forward import bare, last_hidden, passes
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
        batch_size: Sequences per forward pass, if all were as long as the longest.

    Returns:
        One float32 tensor `[completion length]` on the CPU for each completion, in the order given.
    """
    logps: list[Tensor] = [torch.empty(0)] * len(prompts)
    for members, layout in passes(model, prompts, completions, batch_size):
        hidden = last_hidden(model, layout)
        # The position before a token predicts it.
        first = [len(prompts[index]) - 1 for index in members]
        counts = [len(completions[index]) for index in members]
        before = torch.cat([layout.where[i, f : f + n] for i, (f, n) in enumerate(zip(first, counts, strict=True))])
        targets = torch.tensor([token for index in members for token in completions[index]], device=hidden.device)
        scored = score_tokens(bare(model), hidden[before], targets.long()).logps.cpu().split(counts)
        for index, values in zip(members, scored, strict=True):
            logps[index] = values
    return logps
