"""What GRPO and RLOO have in common: a completion is worth what it is better than the others of its prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.callbacks import SyncRefModelCallback

from alignctl.errors import AlignctlError
from alignctl.rollout.drawing import Drawn
from alignctl.rollout.episodes import Episodes, unlearnt
from alignctl.rollout.ready import length_penalty
from alignctl.rollout.rewards import Score, totals
from alignctl.run.paths import StagePaths
from alignctl.trainers.base.managed import Managed
from alignctl.trainers.on_policy.base import OnPolicyTrainer
from alignctl.trainers.on_policy.experience import Experience
from alignctl.trainers.on_policy.group.advantages import without_signal
from alignctl.trainers.on_policy.group.config import GroupConfig

_STEPS_WITHOUT_SIGNAL = 20  # rollouts in which no group has different rewards until training is stopped


class GroupTrainer(Managed, OnPolicyTrainer):
    """Learns from what the completions of a prompt are worth beside each other."""

    args: GroupConfig
    has_reference = True
    stops_at_constant_scores = False  # those of a prompt are looked at
    in_checkpoints = ("steps_without_signal",)

    def __init__(self, *, args: GroupConfig, **others: Any):
        self.has_reference = args.beta != 0
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.steps_without_signal = 0
        super().__init__(args=args, **others)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    @property
    def rounds(self) -> int:
        return self.args.num_iterations

    @property
    def learns_on(self) -> bool:
        """Whether a rollout is learnt from once more after the policy moved; else its ratios are all 1."""
        return self.rounds > 1 or self.args.num_mini_batches > 1

    @property
    @abstractmethod
    def scores_rollout(self) -> bool:
        """Whether the policy is asked what it says of a rollout before it learns from it: a pass more."""

    @property
    def entropy_in_update(self) -> bool:
        return not self.scores_rollout

    @abstractmethod
    def learn_from(self, episodes: Episodes, scores: list[Score]) -> Experience: ...

    def _roll_out(self, inputs: dict[str, Any], drawn: Drawn | None = None) -> Episodes:
        return self.masked(super()._roll_out(inputs, drawn))

    def masked(self, episodes: Episodes) -> Episodes:
        """The same, with nothing learnt from what was cut off, where that is wanted."""
        if not self.args.mask_truncated_completions:
            return episodes
        return unlearnt(episodes, {number for number, ended in enumerate(episodes.ended) if not ended})

    def rewards_of(self, episodes: Episodes, scores: list[Score], asked: Mapping[str, list[Score]]) -> Tensor:
        """Scores of whole completions as `[groups, generations]`, float64, less what long ones lose; NaN where no
        source said anything."""
        values = torch.tensor(totals(scores), dtype=torch.float64, device=self.args.device)
        if self.args.soft_overlong_tokens:
            args = self.args
            lost = length_penalty(episodes.completion_ids, args.response_length, args.soft_overlong_tokens)
            values += values.new_tensor(lost)
        unscored = [not any(score[number] for score in asked.values()) for number in range(len(scores))]
        if not self.rollouts.counts:  # a prompt of a process that has none counts for nothing
            unscored = [True] * len(scores)
        values[torch.tensor(unscored, device=values.device)] = torch.nan
        return values.view(-1, episodes.group_size)

    def note_signal(self, rewards: Tensor, groups: Tensor) -> None:
        """Notes in how many groups rewards do not differ.

        Args:
            groups: `[groups]`, of which nothing is learnt, as TRL counts them.
        """
        self._tellable = int((~without_signal(rewards)).sum())
        self.rollouts.add_mean("frac_reward_zero_std", groups.double())

    def log_rollout(self, episodes: Episodes, experience: Experience, scores: list[Score]) -> None:
        """Under the names of TRL's trainers."""
        log, lengths = self.rollouts, [float(len(ids)) for ids in episodes.completion_ids]
        for name, values in self.asked.items():
            said = [total for total, score in zip(totals(values), values, strict=True) if score]
            log.add_mean(f"rewards/{name}/mean", said, f"rewards/{name}/std", unbiased=True)
        rewards = self.rewards_of(episodes, scores, self.asked)
        log.add_mean("reward", rewards[rewards.isfinite()], "reward_std", unbiased=True)
        ended = torch.tensor([length for length, end in zip(lengths, episodes.ended, strict=True) if end])
        for which, values in (("length", torch.tensor(lengths)), ("terminated_length", ended)):
            for of in ("mean", "min", "max"):
                log.add_of(of, f"completions/{of}_{which}", values)
        log.add_mean("completions/clipped_ratio", [not end for end in episodes.ended])
        log.add_mean("advantages/mean", experience.advantages[experience.mask.bool()], "advantages/std")
        self._prompt_tokens = sum(map(len, episodes.prompt_ids)) if log.counts else 0

    def step_numbers(self) -> dict[str, float]:
        found = super().step_numbers()
        return found | {"tokens": found["tokens"] + self._prompt_tokens, "tellable": self._tellable}

    def take_step_numbers(self, everyone: Mapping[str, Tensor]) -> None:
        """See EndsStepsTogether.

        Raises:
            AlignctlError: For many rollouts no group had different rewards.
        """
        super().take_step_numbers(everyone)
        self.steps_without_signal = 0 if everyone["tellable"].sum() else self.steps_without_signal + 1
        if self.steps_without_signal >= _STEPS_WITHOUT_SIGNAL:
            samples = StagePaths(Path(self.args.output_dir).parent).samples_while_training.name
            raise AlignctlError(
                f"in each of the last {_STEPS_WITHOUT_SIGNAL} rollouts the completions of every prompt were rewarded "
                "alike: there is nothing to learn from",
                f"look at {samples}: the prompts are too easy or too hard for the model, or the reward does not tell "
                "its answers apart",
            )
