"""The LM head, run only at the positions whose tokens are scored, and in chunks: the full logits never exist.

Knows no loss and no trainer; torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.utils.checkpoint import checkpoint

from alignctl.engine.forward import is_divided, most_of_all
from alignctl.engine.row_group import group_of_rows, own_tokens, scores_of_all

# Logits that exist at a time: 64 MiB of float32 on a CPU, 512 MiB on a GPU, where larger pieces run faster.
_LOGITS_CPU, _LOGITS_GPU = 2**24, 2**27


class TokenScores(NamedTuple):
    """What the head says of tokens, `[tokens]` each; the statistics are None unless asked for, and without gradient but
    for that of the entropy where it is wanted."""

    logps: Tensor
    """Natural-log probabilities, float32."""
    entropy: Tensor | None = None
    """Of the distribution over the vocabulary, in nats."""
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    """Whether the token is the most likely one."""
    log_sum_sq_probs: Tensor | None = None
    """Log of the chance that two draws agree."""


def score_tokens(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    statistics: bool = False,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Scores tokens from the last hidden states of the positions before them.

    Where the head is not trained, the gradient of each log-probability is taken in the forward pass. Elsewhere logits
    are made again in the backward pass if they do not fit into one chunk.

    Args:
        model: A causal language model of transformers, without a wrapper around it.
        hidden: `[tokens, width]`
        targets: Token ids `[tokens]`.
        statistics: Whether more than the log-probabilities is wanted.
        temperature: Logits are divided by it.
        entropy_gradient: Whether the entropy, one of the statistics, has a gradient.
    """
    arguments = (model, hidden, targets, statistics, temperature, entropy_gradient)
    if (group := group_of_rows(model)) is None:
        return _score_own(*arguments)
    own = (own_tokens(one, group) for one in (hidden, targets))
    found = _score_own(model, *own, *arguments[3:])
    logps, *others = (one if one is None else scores_of_all(one, len(hidden), group) for one in found)
    return TokenScores(logps, *(one if one is None else one.detach() for one in others))


def _score_own(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    statistics: bool,
    temperature: float,
    entropy_gradient: bool,
) -> TokenScores:
    head = model.get_output_embeddings()
    arguments = (model, hidden, targets, statistics, temperature, entropy_gradient)
    if is_divided(head) and not isinstance(head, FSDPModule) and _is_one_layer(head):
        head.forward = MethodType(_forward, head)
        return head(hidden, lambda given: _score_chunks(head, model, given, *arguments[2:]))
    if not isinstance(head, FSDPModule):
        return _score_chunks(head, *arguments)
    if not hasattr(head, "score_chunks"):  # gathers the head once for all chunks, and once for their backward pass
        head.score_chunks = MethodType(_score_chunks, head)
        register_fsdp_forward_method(head, "score_chunks")
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: _release(head))
    scores = head.score_chunks(*arguments)
    # Embeddings that are tied to the head were run as all modules are, and FSDP still waits for the head: at the end it
    # would call the two run once more, and gather them before the backward pass of everything else. (Private in torch.)
    fully_shard.state(head)._modules_to_run_forward.clear()
    return scores


def _is_one_layer(head: nn.Module) -> bool:
    """Whether it has nothing inside that is run by itself, as an adapter is."""
    return next(head.children(), None) is None


def _forward(head: nn.Module, hidden: Tensor, score: Callable[[Tensor], TokenScores] | None = None) -> Any:
    """The forward of a head that ZeRO-3 divides: its logits, or what comes of all of its pieces in one run, for which
    its weights come together once, and once for the backward pass."""
    return type(head).forward(head, hidden) if score is None else score(hidden)


def _release(head: FSDPModule) -> None:
    """Lets go of a head after its backward pass, and lets that of another forward pass gather it: one that is tied to
    the embeddings FSDP would hold to the end, because their gradients come together there."""
    group = fully_shard.state(head)._fsdp_param_group  # private; by this name in torch 2.8 to 2.13
    group.reshard()
    group._training_state = TrainingState.IDLE


def _score_chunks(
    head: nn.Module,
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    statistics: bool,
    temperature: float,
    entropy_gradient: bool,
) -> TokenScores:
    chunk = max(
        1, (_LOGITS_CPU if hidden.device.type == "cpu" else _LOGITS_GPU) // model.config.get_text_config().vocab_size
    )
    pieces = -(-len(hidden) // chunk)
    if is_divided(head) and not _is_there(head):  # it is gathered for each piece, by all processes together
        pieces = most_of_all(pieces, hidden.device)
    again = torch.is_grad_enabled() and pieces > 1
    at_once = torch.is_grad_enabled() and hidden.requires_grad and not entropy_gradient and _is_fixed(head)
    found = []
    for part in zip(_cut(hidden, chunk, pieces), _cut(targets, chunk, pieces), strict=True):
        arguments = (model, head, *part, statistics, temperature)
        if at_once:
            found.append(TokenScores(*_WithSlope.apply(*arguments)))
        elif again:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            found.append(checkpoint(_score, *arguments, entropy_gradient, **options))
        else:
            found.append(_score(*arguments, entropy_gradient))
    return TokenScores(*(None if column[0] is None else torch.cat(column) for column in zip(*found, strict=True)))


def _cut(tokens: Tensor, chunk: int, pieces: int) -> tuple[Tensor, ...]:
    """So many pieces of at most `chunk` tokens, the last ones of none."""
    cut = tokens.split(chunk)
    return cut + (tokens[:0],) * (pieces - len(cut))


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """What is put around a call would let go of a head that is there after each."""
    return head.forward(hidden) if _is_there(head) else head(hidden)


def _is_there(head: nn.Module) -> bool:
    """Whether all pieces are scored in one run of a divided head."""
    return isinstance(head, FSDPModule) or (is_divided(head) and _is_one_layer(head))


def _is_fixed(head: nn.Module) -> bool:
    """Whether a head is not trained and whole: ZeRO-3 gathers its shards for a backward pass in turn."""
    return not any(p.requires_grad or p.numel() == 0 or hasattr(p, "ds_id") for p in head.parameters())


def _score(
    model: nn.Module,
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    statistics: bool,
    temperature: float,
    entropy_gradient: bool,
) -> TokenScores:
    logits = _scaled(model, _logits(head, hidden))
    if entropy_gradient:
        return _measure(logits, targets, True, temperature, entropy_gradient=True)
    return _maybe_compiled(model, _measure)(logits, targets, statistics, temperature)


class _WithSlope(torch.autograd.Function):
    """`_score` with a head that is not trained. A log-probability depends on one hidden state alone, so what the
    backward pass multiplies is known while the logits are there, and they need not be made again."""

    @staticmethod
    def forward(
        ctx: Any,
        model: nn.Module,
        head: nn.Module,
        hidden: Tensor,
        targets: Tensor,
        statistics: bool,
        temperature: float,
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            given = hidden.view_as(hidden)  # no leaf: FlopCounterMode's hooks on what a module is given refuse leaves
            logits = _scaled(model, _logits(head, given))
        measure = _maybe_compiled(model, _measure_with_slope)
        scores, slope = measure(logits.detach(), targets, statistics, temperature)
        ctx.save_for_backward(*torch.autograd.grad(logits, hidden, slope))
        ctx.mark_non_differentiable(*(one for one in scores[1:] if one is not None))
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None, None, (slope * grad.unsqueeze(-1)).to(slope.dtype), None, None, None


def _measure(
    logits: Tensor, targets: Tensor, statistics: bool, temperature: float, entropy_gradient: bool = False
) -> TokenScores:
    """Scores of logits `[tokens, vocabulary]`, in float32."""
    logits = _tempered(logits, temperature)
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not statistics:
        return TokenScores(logps)
    with torch.no_grad():
        scores = _with_statistics(logps, logits, targets, log_probs, log_probs.exp())
    if entropy_gradient:
        scores = scores._replace(entropy=_EntropyGradient.apply(logits, log_probs.detach(), scores.entropy))
    return scores


def _measure_with_slope(
    logits: Tensor, targets: Tensor, statistics: bool, temperature: float
) -> tuple[TokenScores, Tensor]:
    """Besides, the derivative of each log-probability by the logits given: d log p_t / dz_i = [i = t] - p_i."""
    tempered = _tempered(logits, temperature)
    log_probs, index = tempered.log_softmax(-1), targets.unsqueeze(-1)
    logps, probs = log_probs.gather(-1, index).squeeze(-1), log_probs.exp()
    scores = _with_statistics(logps, tempered, targets, log_probs, probs) if statistics else TokenScores(logps)
    slope = probs.neg_().scatter_add_(-1, index, torch.ones_like(probs[:, :1]))
    return scores, (slope if temperature == 1 else slope.div_(temperature)).to(logits.dtype)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _with_statistics(logps: Tensor, logits: Tensor, targets: Tensor, log_probs: Tensor, probs: Tensor) -> TokenScores:
    entropy = -(probs * log_probs).sum(-1)
    agree = torch.linalg.vector_norm(probs, dim=-1).square().log()
    return TokenScores(logps, entropy, logits.mean(-1), logits.argmax(-1) == targets, agree)


def _maybe_compiled(model: nn.Module, measure: Callable[..., Any]) -> Callable[..., Any]:
    """How logits are looked at: compiled where the model's layers are, see models/compiling.py."""
    backend = getattr(model, "compiled_by", None)
    return measure if backend is None else compiled(measure, backend)


@cache
def compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """A function compiled once for all lengths, by a backend of torch.compile."""
    return torch.compile(function, dynamic=True, backend=backend)


class _EntropyGradient(torch.autograd.Function):
    """The entropy of softmax(logits) with its gradient, dH/dz_i = -p_i (log p_i + H), for which the logarithms alone
    are kept, as their own gradient has them already; autograd would keep probabilities besides."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs, entropy)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        log_probs, entropy = ctx.saved_tensors
        gradient = log_probs.exp().mul_(log_probs + entropy.unsqueeze(-1)).mul_(-grad.unsqueeze(-1))
        return gradient, None, None


def _scaled(model: nn.Module, logits: Tensor) -> Tensor:
    """What some architectures do to logits after the LM head: Cohere, Falcon-H1 and Granite scale, Gemma 2 caps."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            logits = logits * getattr(config, name)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits * scaling if config.model_type == "hyperclovax" else logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap is not None else logits
