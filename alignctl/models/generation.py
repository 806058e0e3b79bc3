"""Draws completions from a policy, in batches of prompts of about one length. Used to measure and to train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignctl.engine.forward import bare
from alignctl.engine.layout import bins
from alignctl.models.template import end_tokens


class Drawn(NamedTuple):
    """Completions as token ids without their prompts, in the order of the prompts."""

    completions: list[list[int]]
    """The end-of-sequence token is kept where there is one."""
    ended: list[bool]
    """Whether a completion ended by itself, and not because it was as long as it may be."""


@torch.no_grad()
def draw_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    max_tokens: int,
) -> Drawn:
    """One completion for each prompt, drawn from the policy's own distribution (no top-k or top-p) with torch's global
    random state.

    Args:
        prompts: Token ids.
        max_tokens: Of a batch, prompts padded to the longest, and completions as long as they may be.
    """
    ends = end_tokens(policy, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    completions: list[list[int]] = [[]] * len(prompts)
    sizes = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in bins(sizes, max_tokens, padded=True):
        longest = max(len(prompts[index]) for index in batch)
        # Padded on the left, so that every completion starts at the same position.
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, index in enumerate(batch):
            input_ids[i, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
            attention_mask[i, longest - len(prompts[index]) :] = 1
        with _nothing_else(bare(policy)):
            output = policy.generate(
                input_ids=input_ids.to(policy.device),
                attention_mask=attention_mask.to(policy.device),
                generation_config=config,
            )
        for i, index in enumerate(batch):
            completions[index] = _until_end(output[i, longest:].tolist(), ends)
    return Drawn(completions, [bool(tokens) and tokens[-1] in ends for tokens in completions])


@contextmanager
def _nothing_else(model: PreTrainedModel) -> Iterator[None]:
    """Without what the checkpoint says about generating: transformers would add its repetition penalty, for instance,
    and draw from another distribution than the policy's."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and with the first that ends the answer; what follows is padding."""
    stop = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
