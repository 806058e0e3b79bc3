"""Completions of a batch of prompts, token by token, over a key-value cache of a fixed size.

On a GPU one token of a large model is thousands of small kernels, and Python is slower at starting them than the card
at running them. A cache of a fixed size keeps all addresses and shapes from token to token, so a step is recorded once
as a CUDA graph and then played. It is recorded anew for each batch, which takes about as long as two steps without a
graph: nothing is compiled, sizes need not repeat, and weights may have moved. drawing.py has what a model is given to
that cannot do this.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from alignctl.engine.forward import evaluating, has_all_weights, is_divided, most_of_all
from alignctl.errors import NotANumber
from alignctl.rollout.streams import choose, shares

NOT_DRAWN = "the model's logits are not finite, so no answer can be drawn from it"

_ROUND = 64  # of the cache's length, so that kernels find what they are aligned to
_FIRST_STEPS = 2  # before one is recorded: libraries set themselves up
_LOOK_EVERY = 8  # steps on a GPU: to look at what was drawn is to wait for it
_TOLERANCE, _TOLERANCE_16 = 1e-2, 1e-1  # of logits, relative; TF32 and 16 bits are rounded, what is wrong is wronger
_tried: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()
_not_recorded: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the model's own distribution at a temperature."""

    temperature: float
    length: int
    """Most tokens of a completion."""
    ends: Sequence[int]
    """Tokens that end it."""
    never: Sequence[int]
    """Ids that are not drawn."""
    pad_id: int
    seeds: Sequence[int]
    """Of each completion's random stream."""


@torch.no_grad()
def decode(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """One completion for each prompt, with what follows its end. Those that have ended are left out of the batch where
    that pays. Where processes divide the model, all of them go on until the last one is done, and are to have as many
    batches.

    Args:
        prompts: Token ids.

    Raises:
        NotANumber: There are no probabilities to draw from.
    """
    batch = _Batch(model, prompts, sampling.pad_id, sampling.length)
    everyone = partial(most_of_all, device=model.device) if is_divided(model) else int
    with model._optimize_model_for_decode():  # by which transformers' own loop chooses kernels for experts, too
        return _go_through(batch, len(prompts), sampling, model.device, everyone)


def _go_through(
    batch: _Batch, count: int, sampling: Sampling, device: torch.device, everyone: Callable[[int], int]
) -> list[list[int]]:
    """Draws token after token; `everyone` says how many rows are left in the process that has most."""
    share = shares(sampling.seeds, sampling.length, device)
    look_every = _LOOK_EVERY if device.type == "cuda" else 1
    ends, never = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (sampling.ends, sampling.never))
    drawn = torch.full((count, sampling.length), sampling.pad_id, device=device)
    rows = torch.arange(count, device=device)  # of those that are in the batch
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for step in range(sampling.length):
        scores = batch.logits.to(torch.float32, copy=True)
        finite &= scores.max().isfinite()  # NaN is the largest of all
        scores[:, never] = -torch.inf
        probs = (scores / sampling.temperature).softmax(-1)
        tokens = choose(probs, share[:, step])
        drawn[rows, step] = tokens.masked_fill(ended, sampling.pad_id)
        ended |= torch.isin(tokens, ends)
        if step + 1 == sampling.length:
            break
        if (step + 1) % look_every == 0:
            going_on = (~ended).nonzero().flatten()
            if not finite or not everyone(len(going_on)):
                break
            if len(going_on) and batch.is_worth_dividing(len(going_on)):
                batch.keep(going_on)
                rows, ended, tokens, share = (one[going_on] for one in (rows, ended, tokens, share))
        batch.go_on(tokens)
    if not finite:
        raise NotANumber(NOT_DRAWN)
    return drawn.tolist()


def padded_before(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts `[prompts, longest]` padded on the left, so that all completions begin at the same place, and where they
    are no padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = True
    return ids, mask


class _Batch:
    """Prompts and what follows them, as far as the model has read: `logits` `[rows, vocabulary]` say what comes next,
    until the batch goes on."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, room: int):
        """Reads the prompts. `room` is how many tokens may follow."""
        ids, mask = padded_before(prompts, pad_id)
        longest = ids.size(1)
        length = -(-(longest + room) // _ROUND) * _ROUND
        seen = torch.zeros((len(prompts), length), dtype=torch.bool)
        seen[:, :longest] = mask
        positions = (seen[:, :longest].cumsum(1) - 1).clamp(min=0).to(model.device)
        self._model, self._cache = model, _fixed_cache(model, length)
        self._seen, self._place, self._positions = seen.to(model.device), longest, positions[:, -1:].contiguous()
        self._tokens = torch.zeros_like(self._positions)
        self._steps, self._graph = 0, None
        self._captures = model.device.type == "cuda" and model not in _not_recorded and not is_divided(model)
        last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self.logits = model(
            input_ids=ids.to(model.device),
            attention_mask=self._seen[:, :longest],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **last,
        ).logits[:, -1]

    def go_on(self, tokens: Tensor) -> None:
        """Reads one more token, `[rows]`."""
        self._tokens.copy_(tokens[:, None])
        self._positions.add_(1)
        self._seen[:, self._place] = True
        self._place += 1
        if self._graph is None and self._captures and self._steps >= _FIRST_STEPS:
            self._capture()
        if self._graph is None:
            self.logits = self._step()
        else:
            self._graph.replay()
            getattr(self._model, "count_pass", lambda: None)()
        self._steps += 1

    def is_worth_dividing(self, left: int) -> bool:
        """Whether to go on with `left` rows is worth the trouble. On a GPU a step takes as long as it takes to read the
        weights, and the cache: only where that is large."""
        if 2 * left > len(self._tokens):
            return False
        if not self._captures:
            return True
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers if layer.is_initialized)
        return 2 * cache >= sum(weight.nbytes for weight in self._model.parameters())

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows; their logits are gone."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values, layer.batch_size = layer.keys[rows], layer.values[rows], len(rows)
        self._seen, self._positions, self._tokens = self._seen[rows], self._positions[rows], self._tokens[rows]
        self._steps, self._graph = 0, None

    def _step(self) -> Tensor:
        output = self._model(
            input_ids=self._tokens,
            attention_mask=self._seen,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]

    def _capture(self) -> None:
        """Records a step. Models that have to look at a number in the middle of it, as some mixtures of experts do, go
        on without."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the card meanwhile
                self.logits = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # torch goes back to its stream, and lets random numbers be drawn again, only where recording ended well.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(before)
            torch.cuda.synchronize()
            self._captures = False
            _not_recorded.add(self._model)
            warnings.warn(f"drawing goes on without a CUDA graph: {str(error).partition(chr(10))[0]}", stacklevel=2)
        else:
            self._graph = graph


class _FixedLayer(StaticLayer):
    """Of one kind: under autocast keys may be of another than values, and attention would cast all of them again with
    each token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        device = key_states.device.type
        autocast = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if autocast else key_states.dtype
        return super().update(key_states.to(kind), value_states.to(kind), *args, **options)


def _fixed_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """A cache of so many tokens. Layers with a window keep all of them, too: what is outside of it is masked, as it is
    without a cache, and what lies where does not depend on how far the text has come."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.layers = [_FixedLayer(max_cache_len=length) for _ in cache.layers]
    return cache


def why_not_fixed(model: PreTrainedModel) -> str | None:
    """Why a model cannot be drawn from with a cache of a fixed size; None where it can, which is tried out once."""
    kind = f"models of type `{model.config.model_type}`"
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return "its weights are divided"
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{kind} are not told where a token stands"
    if not model._can_compile_fullgraph:
        return f"{kind} know none"
    if not has_all_weights(model):
        return None
    if model not in _tried:
        _tried[model] = _try_out(model)
    return _tried[model]


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> str | None:
    """Reads two short texts, a part of them token by token; says what is wrong with the outcome."""
    kind = f"models of type `{model.config.model_type}`"
    ids = (torch.arange(4, 24) % model.config.get_text_config().vocab_size).tolist()
    first, then = [ids[:9], ids[12:17]], ids[9:12]
    try:
        layers = {type(layer) for layer in StaticCache(config=model.config, max_cache_len=_ROUND).layers}
        if not layers <= {StaticLayer, StaticSlidingWindowLayer}:
            return f"{kind} keep more than keys and values"
        with evaluating(model):
            batch = _Batch(model, first, pad_id=0, room=len(then))
            batch._captures = False
            for token in then:
                batch.go_on(torch.tensor([token, token], device=model.device))
            for row, text in enumerate(first):
                alone = model(input_ids=torch.tensor([text + then], device=model.device), use_cache=False).logits[0, -1]
                error = (batch.logits[row] - alone).norm() / alone.norm()
                precise = alone.dtype.itemsize >= 4 and not torch.is_autocast_enabled(model.device.type)
                if error > (_TOLERANCE if precise else _TOLERANCE_16):
                    return f"{kind} compute other numbers with one"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = repr(error).partition("\\n")[0]
        return f"{kind} take none: {reason}"
    return None
