"""Completions drawn by vLLM, through TRL's helper for it: the one place that touches either.

Needs the extra `vllm`. A server needs GPUs; beside the training vLLM's CPU build runs, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration

from alignctl.errors import LaunchError, RequestError
from alignctl.models.generation import end_tokens
from alignctl.models.merging import bytes_kept
from alignctl.models.vocabulary import ids_without_token, rows_before
from alignctl.rollout.drawing import Drawn, as_drawn
from alignctl.rollout.settings import RolloutSettings

# How TRL wants its server.
_SERVER = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve {} --weight-transfer-config \'{{"backend": "nccl"}}\' '
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)


class VLLM:
    """vLLM with the policy's weights, beside the training or as a server of its own."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        settings: RolloutSettings,
        sequences: int,
    ):
        """Starts vLLM, or connects to its server.

        Args:
            sequences: Completions that a process draws at a time.

        Raises:
            RequestError: The policy has no checkpoint that vLLM could load first, or one with fewer embeddings, or
                there is no GPU to hand weights to a server from.
            LaunchError: The server does not answer, or was started without what TRL needs.
        """
        if not policy.name_or_path:
            raise RequestError(
                "`generation=vllm` starts from a checkpoint, and the policy has random weights",
                "train it first, or set `generation=transformers`",
            )
        if rows := rows_before(policy):
            raise RequestError(
                f"`generation=vllm` starts from the checkpoint, which has {rows:,} embeddings; the policy got more",
                "train the new tokens in a stage before, or set `generation=transformers`",
            )
        self._policy, self._ends = policy, end_tokens(policy, tokenizer)
        never = ids_without_token(policy, tokenizer)
        try:
            self._helper = VLLMGeneration(
                policy, accelerator, tokenizer, **helper_settings(settings, sequences, self._ends, never)
            )
        except (OSError, RuntimeError) as error:  # OSError of requests, whose ConnectionError is none of Python's
            if settings.vllm_mode != "server":
                raise
            if isinstance(error, NotImplementedError):
                hint = "train on one, or set `vllm_mode=colocate` of the stage"
                raise RequestError("a vLLM server takes weights from a GPU only", hint) from error
            start = _SERVER.format(policy.name_or_path)
            raise LaunchError(str(error).partition("\n")[0], f"start it: {start}") from error

    def draw(self, prompts: Sequence[Sequence[int]]) -> Drawn:
        """One completion for each prompt, after the policy's weights were handed over."""
        with bytes_kept(self._policy):  # adapters are merged for it, and taken back with rounding
            self._helper.sync_weights()
        _, completions, logps, _ = self._helper.generate(
            prompts=list(map(list, prompts)), images=None, num_generations=1
        )
        drawn = as_drawn(completions, self._ends)
        return drawn._replace(logps=of_drawn(drawn.completions, logps) if logps is not None else None)


def helper_settings(
    settings: RolloutSettings, sequences: int, ends: list[int], never: Sequence[int] = ()
) -> dict[str, Any]:
    """What TRL's helper is told: the policy's own distribution at the temperature, without top-k or top-p.

    Args:
        never: Ids that are not drawn: those without a token.
    """
    return {
        "mode": settings.vllm_mode,
        "server_base_url": settings.vllm_server_base_url,
        "server_host": settings.vllm_server_host,
        "server_port": settings.vllm_server_port,
        "server_timeout": settings.vllm_server_timeout,
        "group_port": settings.vllm_group_port,
        "tensor_parallel_size": settings.vllm_tensor_parallel_size,
        "gpu_memory_utilization": settings.vllm_gpu_memory_utilization,
        "enable_sleep_mode": settings.vllm_enable_sleep_mode,
        "max_model_length": settings.max_prompt_length + settings.response_length,
        "max_num_seqs": sequences * settings.vllm_tensor_parallel_size,
        "temperature": settings.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_completion_length": settings.response_length,
        "generation_kwargs": {"stop_token_ids": ends}
        # Said of the few that are not: vLLM copies these settings for each of its requests. It takes -100 for never.
        | ({"logit_bias": dict.fromkeys(never, -100.0)} if never else {}),
    }


def of_drawn(
    completions: Sequence[Sequence[int]], logps: Sequence[Sequence[Sequence[float | None]]]
) -> list[list[float]]:
    """What vLLM says of the tokens that are kept, NaN for nothing.

    Args:
        logps: Of each token a list, the drawn one's alone.
    """
    return [
        [math.nan if one is None else one for (one,) in row[: len(ids)]]
        for ids, row in zip(completions, logps, strict=True)
    ]
