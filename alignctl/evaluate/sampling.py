"""Samples completions from a policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.schema import EvalSettings
from alignctl.models.template import end_tokens


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    seed: int,
) -> list[list[int]]:
    """One completion for each prompt, drawn from the policy's own distribution (no top-k or top-p).

    Args:
        prompts: Token ids.
        seed: Of the sampling; the caller's random state is left as it was.

    Returns:
        Token ids without the prompt; the end-of-sequence token is kept where there is one.
    """
    device = policy.device
    ends = end_tokens(policy, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: list[list[int]] = [[]] * len(prompts)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            longest = max(len(prompts[index]) for index in batch)
            # Padded on the left, so that every completion starts at the same position.
            input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
            for i, index in enumerate(batch):
                input_ids[i, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
                attention_mask[i, longest - len(prompts[index]) :] = 1
            output = policy.generate(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
            )
            for i, index in enumerate(batch):
                completions[index] = _until_end(output[i, longest:].tolist(), ends)
    return completions


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to and with the first that ends the answer; what follows is padding."""
    stop = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
