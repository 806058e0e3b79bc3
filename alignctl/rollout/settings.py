"""Settings of a rollout: what is drawn, and by what; what scores it, and how scores become one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RolloutSettings:
    """How completions are drawn; the names are those of TRL where it has them."""

    num_generations: int = 1
    """Completions drawn to each prompt; they divide `per_device_train_batch_size`, which counts completions."""
    max_prompt_length: int = 512
    """Longest prompt, in tokens; rows with a longer one are left out."""
    response_length: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Of the drawn completions, > 0; log-probabilities are of the distribution at this temperature."""
    rollout_tokens: int = 65536
    """Most tokens of a batch that is generated, prompts padded and completions at their longest; with continuous
    batching, of all that are held at a time."""
    generation: Literal["auto", "transformers", "continuous", "vllm"] = "auto"
    """What draws completions: transformers' models, batch by batch or with transformers' continuous batching, or vLLM.
    `auto` is vLLM where it is installed, there is a GPU, and it can begin from the policy's checkpoint; else
    `transformers`."""
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

    @property
    def why_not_vllm(self) -> str | None:
        """Why vLLM cannot draw with these settings; None where it can."""
        return None


@dataclass
class RewardSettings:
    """What scores completions, and what is made of the scores."""

    reward_funcs: list[str | dict[str, Any]] = field(default_factory=list)
    """What scores completions beside the reward model: functions, `module:function`, servers by their URL, judges, and
    ready functions by name; each gives a number, or none, for each (docs/rewards.md)."""
    reward_workers: int = 1
    """Processes of each function, among which the prompts of a rollout are divided; their completions stay together."""
    reward_timeout: float = 240.0
    """Seconds that a function, a server or a judge may take for what it is asked at a time."""
    reward_retries: int = 5
    """Times that a server or a judge is asked again where it does not answer: after a second, then after twice as
    long each time."""
    reward_weights: list[float] | None = None
    """Weights of the sources of the reward: the reward model first, then the functions; None weighs all 1."""
    normalize_rewards: Literal["none", "statistics", "running"] = "none"
    """Scores less their mean, over their deviation: those of the reward model's `reward_statistics.json`, or of all
    scores so far."""
    reward_clip: float | None = None
    """Scores are kept within plus and minus this, after they are normalised (arXiv:2005.12729, Sec. 3)."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a completion that does not end by itself, arXiv:2403.17031, Sec. 3."""
