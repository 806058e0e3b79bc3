"""RLOO, arXiv:2402.14740: the baseline of a completion is the mean reward of the others of its prompt, and the KL to
the reference is a part of the reward."""

from __future__ import annotations

import torch

from alignctl.rollout.episodes import Episodes
from alignctl.rollout.kl import kl_estimates
from alignctl.rollout.rewards import Score
from alignctl.trainers.on_policy.experience import Experience, masks, spread
from alignctl.trainers.on_policy.group.advantages import rloo_advantages, with_kl, without_signal
from alignctl.trainers.on_policy.group.config import RLOOConfig
from alignctl.trainers.on_policy.group.objective import clipped_losses, of_each, sum_of_completion
from alignctl.trainers.on_policy.group.trainer import GroupTrainer
from alignctl.trainers.on_policy.models import Outputs
from alignctl.trainers.on_policy.update import PassLoss


class RLOOTrainer(GroupTrainer):
    """REINFORCE leave-one-out on prompts."""

    args: RLOOConfig

    @property
    def scores_rollout(self) -> bool:
        return self.learns_on or self.has_reference

    def counted(self, episodes: Episodes, members: list[int]) -> float:
        return len(members)

    def learn_from(self, episodes: Episodes, scores: list[Score]) -> Experience:
        args, rewards = self.args, self.rewards_of(episodes, scores, self.asked)
        present, mask, completion = masks(episodes, rewards.device)
        outputs = self.outputs_of(episodes) if self.scores_rollout else None
        logps = spread(outputs.logps, episodes) if outputs else None
        ref_logps = spread(outputs.ref_logps, episodes) if outputs else None
        kl = torch.zeros_like(mask, dtype=torch.float)
        if ref_logps is not None:
            kl = kl_estimates(logps, ref_logps, "k1") * mask
            self.rollouts.add_sums("kl", kl.sum(), mask.sum())
            self.rollouts.add_mean("kl/k1", kl.sum(1))
        penalised = with_kl(rewards, kl.sum(1).double().view_as(rewards), args.beta, args.reward_clip_range)
        self.note_signal(rewards, without_signal(penalised))
        advantages = rloo_advantages(penalised, args.normalize_advantages, self.add_up).float().view(-1, 1)
        return Experience(present, mask, completion, logps, ref_logps, advantages.expand_as(mask))

    def losses(self, outputs: Outputs, experience: Experience) -> PassLoss:
        mask, completion = experience.mask, experience.completion
        old = outputs.logps.detach() if experience.logps is None else experience.logps
        ratio = sum_of_completion((outputs.logps - old) * mask, completion).exp()
        clipped = clipped_losses(ratio, experience.advantages, self.args.epsilon, self.epsilon_high)
        losses, low, high = (of_each(one, completion) for one in clipped)
        low, high = low.float(), high.float()
        logged = {
            "clip_ratio/low_mean": low, "clip_ratio/low_min": low, "clip_ratio/high_mean": high,
            "clip_ratio/high_max": high, "clip_ratio/region_mean": low + high,
        }  # fmt: skip
        sums = {}
        if outputs.entropy is not None and not self.scores_rollout:
            sums["entropy"] = (outputs.entropy.detach() * mask).sum()
        return PassLoss(losses.sum(), sums, logged)
