"""One mini-batch of PPO's update: losses, and the gradient of their mean over all tokens of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from alignctl.engine.layout import bins
from alignctl.trainers.ppo.advantage import Experience
from alignctl.trainers.ppo.config import PPOConfig
from alignctl.trainers.ppo.models import Batch, Scored
from alignctl.trainers.ppo.objective import kl_estimates, policy_losses, value_losses

LayOut = Callable[[list[int]], Batch]
"""Gives the forward pass of some completions of the rollout, by their numbers."""


@dataclass
class Sums:
    """Of the tokens of a mini-batch, added up over its passes."""

    tokens: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    clipped: Tensor
    values_clipped: Tensor
    ratio: Tensor
    kl: Tensor
    """k3 against the policy of the rollout."""
    entropy: Tensor


def mini_batches(count: int, parts: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers of completions, shuffled and divided into parts of about the same size."""
    order = torch.randperm(count, generator=generator).tolist()
    for part in range(min(parts, count)):
        yield order[part::parts]


def _as_many_everywhere(passes: list[list[int]], accelerator: Accelerator) -> list[list[int]]:
    """Divides passes until there are as many as in the process that has most: DeepSpeed's processes wait for each other
    in every one. A mini-batch has as many completions everywhere, so there are enough to divide."""
    count = torch.tensor([len(passes)], device=accelerator.device)
    most = int(accelerator.gather(count).max())
    while len(passes) < most:
        longest = max(passes, key=len)
        at = passes.index(longest)
        passes[at : at + 1] = [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    return passes


def backward(
    model: nn.Module,
    lay_out: LayOut,
    experience: Experience,
    lengths: list[int],
    members: list[int],
    policy_weight: float,
    args: PPOConfig,
    accelerator: Accelerator,
    known: Scored | None = None,
) -> Sums:
    """Adds the gradient of a mini-batch to the model's, in passes of at most `update_tokens` tokens.

    The losses are means over the tokens of the whole mini-batch, on all processes: long completions count for what they
    hold, and dividing the work changes nothing.

    Args:
        lengths: Of prompts with their completions, in tokens.
        members: Numbers of the completions.
        policy_weight: Of the policy's loss and its entropy; 0 while only the value model learns.
        known: What the model says of the completions, longest first, where that has been computed with gradients: all
            of them are then one pass.
    """
    own = experience.mask[members].sum()
    tokens = accelerator.reduce(own, "sum")
    passes = [[members[i] for i in part] for part in bins([lengths[m] for m in members], args.update_tokens, False)]
    passes = _as_many_everywhere(passes, accelerator)
    sums = Sums(own, *(torch.zeros((), device=own.device) for _ in range(7)))
    for number, part in enumerate(passes):
        mask = experience.mask[part]
        old_logps, old_values, advantages, returns = (
            whole[part][mask]
            for whole in (experience.logps, experience.values, experience.advantages, experience.returns)
        )
        # Gradients are added up over the processes once, with the last pass; DeepSpeed takes its step there, too.
        last = number == len(passes) - 1
        accelerator.sync_gradients = last
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if last or by_deepspeed else accelerator.no_sync(model):
            scored = known or model(lay_out(part), args.temperature, policy_weight > 0, args.entropy_coef > 0)
            policy = policy_losses(scored.logps, old_logps, advantages, args.cliprange, args.dual_clip)
            value = value_losses(scored.values, old_values, returns, args.cliprange_value)
            # arXiv:1707.06347, Eq. 9
            entropy = scored.entropy.sum() if args.entropy_coef > 0 else torch.zeros_like(sums.entropy)
            moving = policy.losses.sum() - args.entropy_coef * entropy
            loss = policy_weight * moving + args.vf_coef * value.losses.sum()
            accelerator.backward(loss * accelerator.num_processes / tokens)
        with torch.no_grad():
            sums.policy_loss += policy.losses.sum()
            sums.value_loss += value.losses.sum()
            sums.clipped += policy.clipped.sum()
            sums.values_clipped += value.clipped.sum()
            sums.ratio += (scored.logps - old_logps).exp().sum()
            sums.kl += kl_estimates(old_logps, scored.logps, "k3").sum()
            sums.entropy += entropy.detach()
    return sums
