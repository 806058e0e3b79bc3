"""Draws completions from a policy, in batches of prompts of about one length. Used to measure and to train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignctl.engine.forward import bare, in_step, is_divided, takes_packed_rows
from alignctl.engine.layout import bins
from alignctl.engine.watched import done
from alignctl.errors import NotANumber
from alignctl.models.generation import end_tokens
from alignctl.models.merging import merged_meanwhile
from alignctl.models.vocabulary import ids_without_token
from alignctl.rollout.decoding import NOT_DRAWN, Sampling, decode, padded_before, why_not_fixed
from alignctl.rollout.settings import RolloutSettings
from alignctl.rollout.streams import choose, shares

# Of continuous batching: tokens of the cache that are given out together, and the most of a forward pass.
_PAGE, _STEP_TOKENS = 32, 1024


class Drawn(NamedTuple):
    """Completions as token ids without their prompts, in the order of the prompts."""

    completions: list[list[int]]
    """The end-of-sequence token is kept where there is one."""
    ended: list[bool]
    """Whether a completion ended by itself, and not because it was as long as it may be."""
    logps: list[list[float]] | None = None
    """Of each token, as a program says that computes otherwise than the policy; NaN where it says nothing. None where
    the policy itself drew."""

    def first(self, count: int) -> Drawn:
        """The first completions."""
        return Drawn(*(None if values is None else values[:count] for values in self))


@torch.no_grad()
def draw_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    seeds: Sequence[int],
) -> Drawn:
    """One completion for each prompt, drawn from the policy's own distribution (no top-k or top-p) over the tokens that
    there are, by transformers. Where processes divide the policy they draw together.

    Args:
        prompts: Token ids, one at least.
        seeds: Of each completion, for a random stream of its own. Continuous batching has one for all, by the first.
    """
    model = bare(policy)
    sampling = Sampling(
        settings.temperature,
        settings.response_length,
        end_tokens(policy, tokenizer),
        ids_without_token(policy, tokenizer),
        tokenizer.pad_token_id,
        seeds,
    )
    with _nothing_else(model), merged_meanwhile(policy):
        if settings.generation == "continuous":
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seeds[0])
                generated = _continuously(model, prompts, _config(sampling), settings.rollout_tokens)
        else:
            generated = _in_batches(model, prompts, sampling, settings.rollout_tokens)
    return as_drawn(generated, sampling.ends)


def why_cache_grows(policy: PreTrainedModel) -> str | None:
    """Why completions are drawn by transformers' own loop, whose cache grows with them; None where decoding.py does."""
    model = bare(policy)
    with _nothing_else(model), _plain_attention(model):
        return why_not_fixed(model)


def as_drawn(generated: Sequence[Sequence[int]], ends: Sequence[int]) -> Drawn:
    """What was generated, without what follows the first end token."""
    completions = [_until_end(list(tokens), ends) for tokens in generated]
    return Drawn(completions, [bool(tokens) and tokens[-1] in ends for tokens in completions])


def _config(sampling: Sampling) -> GenerationConfig:
    """As transformers wants to be told."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.length,
        eos_token_id=list(sampling.ends),
        pad_token_id=sampling.pad_id,
        suppress_tokens=list(sampling.never) or None,
    )


def _in_batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int
) -> list[list[int]]:
    """Completions, made together with those of prompts of about the same length."""
    generated: list[list[int]] = [[]] * len(prompts)
    sizes = [len(prompt) + sampling.length for prompt in prompts]
    with _plain_attention(model):
        draw = _by_generate if why_not_fixed(model) else decode
        for batch in in_step(model, list(bins(sizes, max_tokens, padded=True))):
            own = replace(sampling, seeds=[sampling.seeds[i] for i in batch])
            for index, tokens in zip(batch, draw(model, [prompts[i] for i in batch], own), strict=True):
                generated[index] = tokens
            done(len(batch))
    return generated


def _by_generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Completions by transformers' own loop, for models that know no cache of a fixed size."""
    input_ids, mask = padded_before(prompts, sampling.pad_id)
    greedy = {"do_sample": False, "temperature": None, "top_k": None}  # over what _OwnStreams leaves
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        generation_config=GenerationConfig(**_config(sampling).to_diff_dict() | greedy),
        logits_processor=LogitsProcessorList([_OwnStreams(sampling, model.device)]),
        synced_gpus=is_divided(model),
    )
    return output[:, input_ids.size(1) :].tolist()


class _OwnStreams(LogitsProcessor):
    """Leaves nothing but the token that is drawn, with random numbers of each row's own stream."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self._temperature, self._step = sampling.temperature, 0
        self._share = shares(sampling.seeds, sampling.length, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.max().isfinite():  # NaN is the largest of all
            raise NotANumber(NOT_DRAWN)
        probs = (scores.float() / self._temperature).softmax(-1)
        tokens = choose(probs, self._share[:, self._step])
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _continuously(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, max_tokens: int
) -> list[list[int]]:
    """Completions by transformers' continuous batching, with a cache of `max_tokens` tokens, or what is needed."""
    cuda = model.device.type == "cuda"
    blocks = [-(-(len(prompt) + config.max_new_tokens) // _PAGE) for prompt in prompts]
    settings = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=max(min(sum(blocks), max_tokens // _PAGE), max(blocks)) + 1,
        max_batch_tokens=min(max_tokens, _STEP_TOKENS),
        # Without these a GPU waits for Python between its kernels most of the time.
        use_cuda_graph=cuda,
        use_async_batching=cuda,
        auto_switch_to_flash=False,  # which might be fetched from the Hub
    )
    with _plain_attention(model):
        manager = model.init_continuous_batching(config, settings)
        try:
            # All before the start, so that the random numbers do not depend on how fast they come.
            requests = manager.add_requests([list(prompt) for prompt in prompts])
            manager.start()
            found: dict[str, list[int]] = {}
            while len(found) < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    if "probability tensor" in str(result.error):
                        raise NotANumber(NOT_DRAWN)
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                if result is not None:
                    found[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError("continuous batching ended before all completions did")
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
    return [found[request] for request in requests]


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """With attention as transformers has it, where the model's is one for packed rows."""
    own, packed = model.config._attn_implementation, takes_packed_rows(model)
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(own)


@contextmanager
def _nothing_else(model: PreTrainedModel) -> Iterator[None]:
    """Without what the checkpoint says about generating: transformers would add its repetition penalty, for instance,
    and draw from another distribution than the policy's. And without the load of a mixture of experts, which training
    asks its config for, and of which transformers (5.23) makes no sense while it generates."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    config = model.config.get_text_config()
    balanced = getattr(config, "output_router_logits", None)
    if balanced:
        config.output_router_logits = False
    try:
        yield
    finally:
        model.generation_config = own
        if balanced:
            config.output_router_logits = balanced


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to and with the first that ends the answer; what follows is padding."""
    stop = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
