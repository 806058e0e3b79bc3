"""The LM head, run only at the positions whose tokens are scored, and in chunks: the full logits never exist.

Knows no loss and no trainer; torch only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    Logits are made again in the backward pass where they do not fit into one chunk.

    Args:
        model: A causal language model of transformers, without a wrapper around it.
        hidden: `[tokens, width]`
        targets: Token ids `[tokens]`.
        statistics: Whether more than the log-probabilities is wanted.
        temperature: Logits are divided by it.
        entropy_gradient: Whether the entropy, one of the statistics, has a gradient.
    """
    head = model.get_output_embeddings()
    chunk = max(
        1, (_LOGITS_CPU if hidden.device.type == "cpu" else _LOGITS_GPU) // model.config.get_text_config().vocab_size
    )
    again = torch.is_grad_enabled() and len(hidden) > chunk
    pieces = []
    for part in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        arguments = (model, head, *part, statistics, temperature, entropy_gradient)
        if again:
            pieces.append(checkpoint(_score, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_score(*arguments))
    return TokenScores(*(None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True)))


def _score(
    model: nn.Module,
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    statistics: bool,
    temperature: float,
    entropy_gradient: bool,
) -> TokenScores:
    logits = _scaled(model, head(hidden)).float() / temperature
    normalizer = logits.logsumexp(-1)
    logps = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normalizer
    if not statistics:
        return TokenScores(logps)
    with torch.no_grad():
        log_probs = logits - normalizer.unsqueeze(-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1)
        others = (logits.mean(-1), logits.argmax(-1) == targets, probs.square_().sum(-1).log())
    if entropy_gradient:
        entropy = _EntropyGradient.apply(logits, normalizer.detach(), entropy)
    return TokenScores(logps, entropy, *others)


class _EntropyGradient(torch.autograd.Function):
    """The entropy of softmax(logits) with its gradient, dH/dz_i = -p_i (log p_i + H), of which the logits alone are
    kept; autograd would keep probabilities and their logarithms besides."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, normalizer: Tensor, entropy: Tensor) -> Tensor:
        ctx.save_for_backward(logits, normalizer, entropy)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, normalizer, entropy = ctx.saved_tensors
        log_probs = logits - normalizer.unsqueeze(-1)
        gradient = log_probs.exp().mul_(log_probs.add_(entropy.unsqueeze(-1))).mul_(-grad.unsqueeze(-1))
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
