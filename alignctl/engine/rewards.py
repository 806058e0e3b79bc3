"""Scores of whole sequences by a sequence classifier. Knows no loss and no trainer; torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from alignctl.engine.forward import bare, last_hidden, passes, takes_packed_rows


@torch.no_grad()
def sequence_scores(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """The model's score of each completion after its prompt; its mode is left as it is.

    Args:
        model: A sequence classifier of transformers with one output and a pad token, or one wrapped by peft.
        prompts: Token ids.
        completions: Token ids.
        batch_size: Sequences per forward pass, if all were as long as the longest.
    """
    pad_id = bare(model).config.get_text_config().pad_token_id
    scores = [0.0] * len(prompts)
    for members, layout in passes(model, prompts, completions, batch_size, pad_id):
        if takes_packed_rows(model):
            last = [_last([*prompts[index], *completions[index]], pad_id) for index in members]
            where = layout.where[torch.arange(len(members)), torch.tensor(last)]
            logits = bare(model).score(last_hidden(model, layout)[where])
        else:
            logits = model(**layout.inputs, use_cache=False).logits
        for index, value in zip(members, logits[:, 0].float().tolist(), strict=True):
            scores[index] = value
    return scores


def _last(tokens: Sequence[int], pad_id: int) -> int:
    """Where a sequence is scored, as transformers does it: its last token that is not the padding's, which some
    tokenizers write at the end, too."""
    return max((position for position, token in enumerate(tokens) if token != pad_id), default=0)
