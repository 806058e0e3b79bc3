"""Settings of GRPO and RLOO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignctl.trainers.on_policy.config import OnPolicyConfig


@dataclass
class GroupConfig(OnPolicyConfig):
    """Settings of the methods that compare the completions of a prompt with each other, beside those of all on-policy
    methods; names and defaults are TRL's where it has them."""

    response_length: int = 512
    """Longest completion, in tokens; TRL's `max_completion_length`, which is taken, too."""
    num_mini_batches: int = 1
    """Optimizer steps per time that a rollout is gone through; TRL's `steps_per_generation` where it accumulates
    nothing, which is taken, too."""
    num_iterations: int = 1
    """Times that a rollout is gone through."""
    epsilon: float = 0.2
    """How far the ratio to the policy of the rollout may fall below 1."""
    epsilon_high: float | None = None
    """How far it may rise above 1; None for `epsilon`. With `loss_type=cispo` the largest ratio itself."""
    mask_truncated_completions: bool = False
    """Whether completions that did not end by themselves are left out of the loss; they stay in their group's
    baseline."""
    soft_overlong_tokens: int | None = None
    """The last tokens before the longest completion over which the reward falls by up to 1, arXiv:2503.14476; None
    for no such penalty."""
    sync_ref_model: bool = False
    """Whether the reference follows the policy, arXiv:2404.09656."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in what the reference becomes; the rest is the reference."""
    ref_model_sync_steps: int = 512
    """Rollouts after which the reference follows."""

    def __post_init__(self) -> None:
        if self.num_generations < 2 or self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"`num_generations={self.num_generations}` must be 2 or more, and divide "
                f"`per_device_train_batch_size={self.per_device_train_batch_size}`"
            )
        super().__post_init__()


@dataclass
class GRPOConfig(GroupConfig):
    """Settings of GRPO."""

    num_generations: int = 8
    """Completions drawn to each prompt; they divide `per_device_train_batch_size`, which counts completions."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference in the loss; 0 needs no reference, and none is loaded."""
    use_bias_correction_kl: bool = True
    """Whether the KL estimate of a token is weighted with its ratio, arXiv:2512.02556: its gradient is then that of the
    divergence, on policy, too."""
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"] = "dapo"
    """The loss of a token, and what the sum is divided by: docs/rl.md."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether ratios are of tokens, or of completions, as the geometric mean of their tokens' (GSPO,
    arXiv:2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] | bool = "group"
    """What rewards less the mean of their group are divided by: the deviation of the group, that of the rollout, or
    nothing; true is group, false none."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether rewards of several sources are added up before they are scaled, or each is scaled in its group first, and
    their sum over the rollout (GDPO, arXiv:2601.05242)."""
    zero_signal_groups: Literal["keep", "drop", "redraw"] = "keep"
    """What becomes of prompts whose completions are all rewarded alike, from which nothing is learnt: keep counts them
    in means; drop leaves them out; redraw draws to them again first (dynamic sampling, arXiv:2503.14476)."""
    max_redraws: int = 2
    """Times that is drawn again in a rollout, with `zero_signal_groups=redraw`."""
    delta: float | None = None
    """Above 1 + `epsilon_high`: bounds the ratio where the advantage is negative, arXiv:2505.07291; None for no
    bound."""
    sapo_temperature_pos: float = 1.0
    """Of `sapo`, where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Of `sapo`, elsewhere."""
    vespo_k_pos: float = 2.0
    """Of `vespo`, where the advantage is not negative: how fast completions count less that became unlikelier."""
    vespo_lambda_pos: float = 3.0
    """Likewise, of those that became likelier."""
    vespo_k_neg: float = 3.0
    """Where it is negative: of those that became unlikelier."""
    vespo_lambda_neg: float = 2.0
    """Likewise, of those that became likelier."""
    off_policy_mask_threshold: float | None = None
    """Nats per token by which a completion with a negative advantage may have become unlikelier until it is left out,
    arXiv:2512.02556; None for no such limit."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens of a rollout that are learnt from, those of highest entropy when they were drawn,
    arXiv:2506.01939."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, in nats per token, which is taken off the loss; the start where it is adapted."""
    use_adaptive_entropy: bool = False
    """Whether that weight follows the entropy, arXiv:2505.22312: it counts only while the entropy is not above
    `entropy_target`."""
    entropy_coef_min: float = 0.0
    """Least weight that is adapted to."""
    entropy_coef_max: float = 1.0
    """Largest weight that is adapted to."""
    entropy_coef_delta: float = 0.005
    """What the weight changes by after a rollout."""
    entropy_target: float = 0.2
    """Nats per token; most models begin far above this, so it is set near what the first rollouts show."""
    vllm_importance_sampling_correction: bool = True
    """Whether the loss is weighted for what vLLM computes otherwise than the policy."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Whether weights are of tokens or completions, and kept within the bounds or 0 outside them."""
    vllm_importance_sampling_clip_min: float | None = None
    """Least weight; None for no bound."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Largest weight; None for no bound."""

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()

    @property
    def why_not_vllm(self) -> str | None:
        mode = self.vllm_importance_sampling_mode
        if self.zero_signal_groups == "redraw":
            return "`zero_signal_groups=redraw` asks each process for another number of completions"
        if self.loss_type == "vespo" and self.vllm_importance_sampling_correction and not mode.startswith("token"):
            return f"`loss_type=vespo` weights tokens, and `vllm_importance_sampling_mode={mode}` completions"
        return None


@dataclass
class RLOOConfig(GroupConfig):
    """Settings of RLOO."""

    num_generations: int = 2
    """Completions drawn to each prompt; they divide `per_device_train_batch_size`, which counts completions."""
    beta: float = 0.05
    """Weight of the KL divergence to the reference in the reward; 0 needs no reference, and none is loaded."""
    normalize_advantages: bool = False
    """Whether advantages are shifted and scaled to mean 0 and variance 1 over a rollout."""
    reward_clip_range: list[float] | None = None
    """Least and largest reward of a completion, before the KL penalty; None for no bounds."""
