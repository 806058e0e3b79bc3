"""Scores of whole sequences by a sequence classifier. Knows no loss and no trainer; torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from alignctl.engine.forward import bare, last_hidden, passes, takes_packed_rows
from alignctl.engine.layout import Layout


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
            rows = [torch.tensor([*prompts[index], *completions[index]]) for index in members]
            ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
            logits = score_layout(bare(model), layout, ids)
        else:
            logits = model(**layout.inputs, use_cache=False).logits
        for index, value in zip(members, logits[:, 0].float().tolist(), strict=True):
            scores[index] = value
    return scores


def score_layout(model: nn.Module, layout: Layout, input_ids: Tensor) -> Tensor:
    """Scores `[batch, 1]` of the sequences of a layout.

    Like transformers: of the last token that is not the padding's, which some tokenizers also write at the end.

    Args:
        model: Without a wrapper.
        input_ids: The sequences padded on the right, `[batch, length]`.
    """
    input_ids = input_ids.to(layout.where.device)
    columns = torch.arange(input_ids.size(1), device=input_ids.device)
    last = (columns * (input_ids != model.config.get_text_config().pad_token_id)).argmax(-1, keepdim=True)
    return model.score(last_hidden(model, layout)[layout.where.gather(1, last).squeeze(1)])
