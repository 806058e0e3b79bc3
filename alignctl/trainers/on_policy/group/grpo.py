"""GRPO, arXiv:2402.03300, and its variants: the completions of a prompt are each other's baseline, no value model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignctl.errors import RequestError
from alignctl.rollout.episodes import Episodes, drawn_again, episodes_of, unlearnt
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score, combine, totals
from alignctl.trainers.on_policy.experience import Experience, masks, spread
from alignctl.trainers.on_policy.group.advantages import gdpo_advantages, grpo_advantages, without_signal
from alignctl.trainers.on_policy.group.config import GRPOConfig
from alignctl.trainers.on_policy.group.objective import (
    Clipped,
    adapted_entropy_coef,
    cispo_losses,
    clipped_losses,
    mean_of_completion,
    near_policy,
    of_each,
    quantile,
    sampler_ratios,
    sapo_losses,
    sum_of_completion,
    vespo_weights,
)
from alignctl.trainers.on_policy.group.trainer import GroupTrainer
from alignctl.trainers.on_policy.models import Outputs
from alignctl.trainers.on_policy.update import PassLoss

# What the sum of the losses of tokens is divided by. TRL divides those over the tokens of all by what a step has of
# them on average, where a rollout is divided among several.
_OVER_COMPLETIONS = ("grpo", "sapo", "luspo", "dr_grpo")
_OVER_ROLLOUT = ("dapo", "cispo", "vespo")
_MEANS_OF_COMPLETIONS = ("grpo", "sapo")


@dataclass(frozen=True)
class GRPOExperience(Experience):
    """What a rollout is worth to GRPO."""

    high_entropy: Tensor | None
    """Tokens whose loss counts; None for all."""
    sampler_ratio: Tensor | None
    """What tokens are weighted by because another program drew them; None for nothing."""
    drawn_logps: Tensor | None
    """As that program said; None where the policy drew."""


class GRPOTrainer(GroupTrainer):
    """Group relative policy optimization on prompts."""

    args: GRPOConfig
    in_checkpoints = (*GroupTrainer.in_checkpoints, "entropy_coef", "last_entropy")

    def __init__(self, *, args: GRPOConfig, **others: Any):
        self.entropy_coef, self.last_entropy = args.entropy_coef, None
        self._left_out: set[int] = set()
        if args.generation == "vllm" and (why := args.why_not_vllm):
            raise RequestError(f"vLLM cannot draw: {why}", "set `generation=transformers`")
        super().__init__(args=args, **others)

    @property
    def entropy_learns(self) -> bool:
        return self.args.entropy_coef != 0 or self.args.use_adaptive_entropy

    @property
    def scores_rollout(self) -> bool:
        by_entropy = self.args.top_entropy_quantile < 1 or self.args.use_adaptive_entropy
        by_sampler = self.args.generation == "vllm" and self.args.vllm_importance_sampling_correction
        return self.learns_on or by_entropy or by_sampler

    def counted(self, episodes: Episodes, members: list[int]) -> float:
        args = self.args
        if args.loss_type in _OVER_ROLLOUT:
            return sum(map(sum, episodes.trained)) / self._num_mini_batches
        if args.loss_type in _OVER_COMPLETIONS:
            rows = sum(member not in self._left_out for member in members)
            return rows * (args.response_length if args.loss_type == "dr_grpo" else 1)
        return super().counted(episodes, members)

    @property
    def _num_mini_batches(self) -> int:
        """Those of this rollout that have anything: the last one of an epoch may have fewer prompts."""
        return min(self.args.num_mini_batches, self._of_all // self.args.num_generations)

    @torch.no_grad()
    def ask(self, episodes: Episodes) -> tuple[Episodes, dict[str, list[Score]]]:
        """Draws again to prompts whose completions are rewarded alike, and leaves out those of which that stays so, as
        far as that is wanted."""
        args = self.args
        episodes, asked = super().ask(episodes)
        self._left_out = set()
        if args.zero_signal_groups == "keep":
            return episodes, asked
        alike = self._alike(episodes, asked)
        for attempt in range(1, args.max_redraws + 1) if args.zero_signal_groups == "redraw" else ():
            if not self.add_up(torch.tensor(len(alike), device=args.device)):
                break
            episodes, asked = self._draw_again(episodes, asked, alike, attempt)
            alike = self._alike(episodes, asked)
        self._left_out = {member for group in alike for member in episodes.groups[group]}
        return unlearnt(episodes, self._left_out), asked

    def _alike(self, episodes: Episodes, asked: dict[str, list[Score]]) -> list[int]:
        """The groups of this process whose rewards do not differ, whatever they will be scaled by."""
        if not self.rollouts.counts:
            return []
        scores = combine(asked, self.scoring.weights, {}, None)
        rewards = self.rewards_of(episodes, scores, asked)
        if penalty := self.args.missing_eos_penalty:
            cut_off = torch.tensor([not ended for ended in episodes.ended], device=rewards.device)
            rewards -= penalty * cut_off.view_as(rewards)
        return without_signal(rewards).nonzero().flatten().tolist()

    def _draw_again(
        self, episodes: Episodes, asked: dict[str, list[Score]], groups: list[int], attempt: int
    ) -> tuple[Episodes, dict[str, list[Score]]]:
        """With other completions of some groups. Processes draw together, and score together where they divide a reward
        model: one that has none draws to its first prompt, for nothing."""
        args = self.args
        members = [member for group in groups or [0] for member in episodes.groups[group]]
        prompts = [episodes.prompt_ids[member] for member in members]
        of_all = args.train_batch_size * self.accelerator.num_processes
        drawn = self.draw(prompts, [attempt * of_all + member for member in members])
        columns = {name: [values[member] for member in members] for name, values in episodes.columns.items()}
        given = [episodes.prompts[member] for member in members]
        part = episodes_of(given, prompts, drawn, self.processing_class, columns, episodes.group_size)
        part = replace(part, row_numbers=[episodes.row_numbers[member] for member in members if episodes.row_numbers])
        asked = {name: list(scores) for name, scores in asked.items()}
        found = self.outage.ask_again(part)
        if not groups:
            return episodes, asked
        for name, scores in found.items():
            for member, score in zip(members, scores, strict=True):
                asked[name][member] = score
        return drawn_again(episodes, members, self.masked(part)), asked

    def learn_from(self, episodes: Episodes, scores: list[Score]) -> GRPOExperience:
        args, rewards = self.args, self.rewards_of(episodes, scores, self.asked)
        self.note_signal(rewards, without_signal(rewards))
        left_out = torch.tensor([member in self._left_out for member in range(rewards.numel())], device=rewards.device)
        advantages = self._advantages(rewards.masked_fill(left_out.view_as(rewards), torch.nan)).float().view(-1, 1)
        present, mask, completion = masks(episodes, advantages.device)
        outputs = self.outputs_of(episodes) if self.scores_rollout else None
        logps = spread(outputs.logps, episodes) if outputs else None
        ref_logps = spread(outputs.ref_logps if outputs else self.ref_logps_of(episodes), episodes)
        high = None
        if args.top_entropy_quantile < 1:
            high = self._high_entropy(spread(outputs.entropy, episodes), mask)
        if self.entropy_learns:
            self._weigh_entropy(episodes, outputs, mask if high is None else mask & high)
        drawn = None
        if episodes.drawn_logps is not None:
            flat = [one for row in episodes.drawn_logps for one in row]
            drawn = spread(torch.tensor(flat, device=advantages.device), episodes)
        return GRPOExperience(
            present, mask, completion, logps, ref_logps, advantages.expand_as(mask), high_entropy=high,
            sampler_ratio=self._sampler_ratio(drawn, logps, present, mask, completion), drawn_logps=drawn,
        )  # fmt: skip

    def _advantages(self, rewards: Tensor) -> Tensor:
        args = self.args
        if args.multi_objective_aggregation == "sum_then_normalize":
            return grpo_advantages(rewards, args.scale_rewards, self.add_up)
        by_source = torch.tensor(
            [
                [total if score else torch.nan for total, score in zip(totals(one), one, strict=True)]
                for one in self.asked.values()
            ],
            dtype=rewards.dtype,
            device=rewards.device,
        ).view(-1, *rewards.shape)
        by_source = by_source.masked_fill(rewards.isnan(), torch.nan)
        return gdpo_advantages(by_source, self.scoring.weights, self.add_up)

    def _high_entropy(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """The tokens of a rollout, of all processes, whose entropy is among the highest."""
        there = entropy.where(mask, torch.nan).flatten()
        everyone = self.accelerator.gather(self.accelerator.pad_across_processes(there, pad_index=torch.nan))
        return entropy >= quantile(everyone, 1 - self.args.top_entropy_quantile)

    def _sampler_ratio(
        self, drawn: Tensor | None, logps: Tensor | None, present: Tensor, mask: Tensor, completion: Tensor
    ) -> Tensor | None:
        """What tokens are weighted by where vLLM drew them; None where the policy did."""
        args = self.args
        if drawn is None or not args.vllm_importance_sampling_correction:
            return None
        found = torch.ones_like(logps)
        found[present] = ratio = sampler_ratios(
            logps[present], drawn[present], mask[present], completion[present], args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max,
        )  # fmt: skip
        learnt = mask[present]
        apart = (logps - drawn)[present][learnt].abs()
        apart = apart[apart.isfinite()]
        ratio = ratio[learnt] if args.vllm_importance_sampling_mode.startswith("token") else found[:, 0]
        for name, values in {"sampling_logp_difference": apart, "importance_sampling_ratio": ratio}.items():
            for of in ("min", "mean", "max"):
                self.rollouts.add_of(of, f"sampling/{name}/{of}", values)
        return found

    def _weigh_entropy(self, episodes: Episodes, outputs: Outputs | None, mask: Tensor) -> None:
        """Finds what the entropy of a token counts in this update: that of all is a mean over the tokens of a rollout,
        whatever the losses are divided by."""
        args, everyone = self.args, list(range(len(episodes.prompt_ids)))
        counts = self.counted(episodes, everyone if self.rollouts.counts else [])
        if args.loss_type in _OVER_ROLLOUT:
            counts *= self._num_mini_batches
        entropy = (spread(outputs.entropy, episodes) * mask).sum() if outputs else mask.new_zeros((), dtype=torch.float)
        counted, tokens, entropy = self.add_up(torch.stack([entropy.new_tensor(counts), mask.sum(), entropy])).tolist()
        wanted = not args.use_adaptive_entropy or (
            self.last_entropy is not None and self.last_entropy <= args.entropy_target
        )
        self._entropy_weight = self.entropy_coef * counted / max(tokens, 1.0) if wanted else 0.0
        if args.use_adaptive_entropy:
            self.last_entropy = entropy / max(tokens, 1.0)
            self.entropy_coef = adapted_entropy_coef(
                self.entropy_coef, self.last_entropy, args.entropy_target, args.entropy_coef_delta,
                args.entropy_coef_min, args.entropy_coef_max,
            )  # fmt: skip
        self.rollouts.add("entropy_coef", self.entropy_coef)

    def losses(self, outputs: Outputs, experience: GRPOExperience) -> PassLoss:
        args, logps, advantages = self.args, outputs.logps, experience.advantages
        mask, completion = experience.mask, experience.completion
        old = logps.detach() if experience.logps is None else experience.logps
        of_tokens = args.importance_sampling_level == "token"
        log_ratio = logps - old
        ratio = (log_ratio if of_tokens else mean_of_completion(log_ratio, mask, completion)).exp()
        losses, shares, completions = self._of_tokens(ratio, log_ratio, logps, experience)
        if args.off_policy_mask_threshold is not None:
            drawn = old if experience.drawn_logps is None else experience.drawn_logps
            losses = losses * near_policy(logps, drawn, advantages, mask, completion, args.off_policy_mask_threshold)
        if experience.high_entropy is not None:
            losses = losses * experience.high_entropy
        if experience.sampler_ratio is not None and args.loss_type != "vespo":
            losses = losses * experience.sampler_ratio
        if experience.ref_logps is not None:
            kl = kl_estimates(logps, experience.ref_logps, "k3")
            if args.use_bias_correction_kl:
                kl = kl * ratio
            losses = losses + args.beta * kl
            shares["kl"] = kl
            k1 = kl_estimates(logps.detach(), experience.ref_logps, "k1") * mask
            completions["kl/k1"] = of_each(sum_of_completion(k1, completion), completion)
        if args.loss_type in _MEANS_OF_COMPLETIONS:
            losses = losses / sum_of_completion(mask.float(), completion).clamp(min=1)
        loss = (losses * mask).sum()
        if outputs.entropy is not None and not self.scores_rollout:
            shares["entropy"] = outputs.entropy
        if self.entropy_learns:
            learns = mask if experience.high_entropy is None else mask * experience.high_entropy
            loss = loss - self._entropy_weight * (outputs.entropy * learns).sum()
        sums = {name: (share.detach() * mask).sum() for name, share in shares.items()}
        return PassLoss(loss, sums, completions)

    def _of_tokens(
        self, ratio: Tensor, log_ratio: Tensor, logps: Tensor, experience: GRPOExperience
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Losses of tokens, and what is logged of them: means over tokens, and over completions."""
        args, advantages = self.args, experience.advantages
        mask, completion = experience.mask, experience.completion
        if args.loss_type == "cispo":
            losses = cispo_losses(ratio, logps, advantages, self.epsilon_high)
            return losses, {"cispo_clip_ratio": ((ratio > self.epsilon_high) & (advantages > 0)).float()}, {}
        if args.loss_type == "sapo":
            return sapo_losses(ratio, advantages, args.sapo_temperature_pos, args.sapo_temperature_neg), {}, {}
        if args.loss_type == "vespo":
            positive = args.vespo_k_pos, args.vespo_lambda_pos
            negative = args.vespo_k_neg, args.vespo_lambda_neg
            phi = vespo_weights(log_ratio, advantages, mask, completion, positive, negative, experience.sampler_ratio)
            return -phi * advantages * logps, {}, {"vespo/phi_seq_mean": of_each(phi, completion)}
        clipped = clipped_losses(ratio, advantages, args.epsilon, self.epsilon_high, args.delta)
        return clipped.losses, *_clip_ratios(clipped, experience, args.importance_sampling_level == "token")


def _clip_ratios(
    clipped: Clipped, experience: Experience, of_tokens: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares of tokens, or of completions, that no longer move the model; and the completions that have least and most
    of them."""
    kinds = {"low": clipped.low.float(), "high": clipped.high.float()}
    shares = {f"clip_ratio/{name}_mean": one for name, one in kinds.items()}
    shares["clip_ratio/region_mean"] = kinds["low"] + kinds["high"]
    own = {
        name: of_each(mean_of_completion(one, experience.mask, experience.completion), experience.completion)
        for name, one in kinds.items()
    }
    ends = {"clip_ratio/low_min": own["low"], "clip_ratio/high_max": own["high"]}
    if of_tokens:
        return shares, ends
    return {}, ends | {name: of_each(share, experience.completion) for name, share in shares.items()}
