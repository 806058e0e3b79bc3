"""Settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from alignctl.trainers.base.on_engine import EngineConfig


@dataclass
class PPOConfig(EngineConfig, TrainingArguments):
    """Settings of PPO beside those of transformers; the names are those of TRL's former PPOConfig where it had them.

    A step is a rollout of `per_device_train_batch_size` completions and all updates made with it.
    """

    roles: Literal["separate", "shared_value", "shared_base"] = "separate"
    """What is held in memory. separate: each model by itself, the value model starting from the reward model where
    there is one; shared_value: the value model is a head on the policy's last hidden states; shared_base: policy, value
    model and reward model are adapters of one frozen base, which by itself is the reference."""
    reward_funcs: list[str] = field(default_factory=list)
    """Functions that score completions, `module:function`, beside the reward model: called with `prompts` and
    `completions` (text or messages, as the rows have them), they return a number for each."""
    reward_weights: list[float] | None = None
    """Weights of the sources of the reward: the reward model first, then the functions; None weighs all 1."""

    max_prompt_length: int = 512
    """Longest prompt, in tokens; rows with a longer one are left out."""
    response_length: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Of the drawn completions, > 0; log-probabilities are of the distribution at this temperature."""
    rollout_tokens: int = 65536
    """Most tokens of a batch that is generated, prompts padded and completions at their longest; with continuous
    batching, of all that are held at a time."""
    generation: Literal["transformers", "continuous", "vllm"] = "transformers"
    """What draws completions: transformers, batch by batch or with continuous batching, or vLLM."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """Whether vLLM runs beside the training or is a server (`vllm serve`). This and what follows has TRL's
    names and defaults."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of a GPU's memory for a vLLM on it."""
    vllm_tensor_parallel_size: int = 1
    """GPUs that a vLLM on them is divided among."""
    vllm_enable_sleep_mode: bool = False
    """Whether a vLLM beside the training gives its memory back during the update."""
    vllm_server_base_url: str | None = None
    """Of the server, in place of host and port."""
    vllm_server_host: str = "0.0.0.0"
    """Of the server, where no URL is given."""
    vllm_server_port: int = 8000
    """Of the server, where no URL is given."""
    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server."""
    vllm_group_port: int = 51216
    """Port over which weights go to the server."""
    update_tokens: int = 16384
    """Most tokens that a pass of the update holds; gradients of a mini-batch are summed over its passes."""

    num_ppo_epochs: int = 4
    """Times that a rollout is gone through."""
    num_mini_batches: int = 1
    """Optimizer steps per time."""
    kl_coef: float = 0.05
    """Weight of the KL penalty of each token against the reference; the start where it is adapted."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the penalty: http://joschu.net/blog/kl-approx.html."""
    target_kl: float | None = None
    """KL to the reference, in nats per completion, that the coefficient is adapted to (arXiv:1909.08593, Sec. 2.2);
    None keeps the coefficient fixed."""
    kl_horizon: int = 10000
    """Completions over which an adapted coefficient changes by up to a fifth."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a completion that does not end by itself, arXiv:2403.17031, Sec. 3."""
    bootstrap_truncated: bool = False
    """Whether the value after the last token counts where a completion was cut off, as in a game that goes on; false
    takes it for the end."""
    normalize_rewards: Literal["none", "statistics", "running"] = "none"
    """Scores less their mean, over their deviation: those of the reward model's `reward_statistics.json`, or of all
    scores so far."""
    reward_clip: float | None = None
    """Scores are kept within plus and minus this, after they are normalised (arXiv:2005.12729, Sec. 3)."""
    whiten_rewards: bool = False
    """Whether the rewards of the tokens of a rollout are scaled to variance 1, KL penalty included."""
    whiten_advantages: bool = True
    """Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens of a rollout."""
    gamma: float = 1.0
    """Discount of what comes a token later."""
    lam: float = 0.95
    """lambda of generalized advantage estimation, arXiv:1506.02438."""
    cliprange: float = 0.2
    """How far the ratio to the policy of the rollout may move, arXiv:1707.06347, Eq. 7."""
    dual_clip: float | None = None
    """Above 1: limits what tokens with a negative advantage count, arXiv:1912.09729, Eq. 4."""
    cliprange_value: float | None = 0.2
    """How far a value may move from that of the rollout; None for no limit."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, in nats per token, which is taken off the loss: above 0 it keeps completions
    diverse (arXiv:1707.06347, Eq. 9)."""
    value_warmup_steps: int = 0
    """First steps in which the value model learns alone."""
    remove_unused_columns: bool = False
    """Nothing is to be removed: prompts go to the trainer as the rows have them."""
    disable_dropout: bool = True
    """Switches dropout off, so that the first ratio of every rollout is 1."""
    num_sample_completions: int = 4
    """Completions of each log that are kept with their reward in samples_while_training.jsonl."""
