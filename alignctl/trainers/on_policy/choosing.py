"""What `generation=auto` is: vLLM where that can be, and what of transformers otherwise."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedModel

from alignctl.models.vocabulary import rows_before
from alignctl.rollout.settings import RolloutSettings


def why_not_vllm(policy: PreTrainedModel, settings: RolloutSettings, device: torch.device) -> str | None:
    """Why vLLM beside the training would not draw from a policy; None where it would. Its sizes are looked at, not
    what vLLM knows of its kind.

    Args:
        policy: Before an adapter is put on it.
        device: Where it will be trained.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if device.type != "cuda":
        return "there is no GPU"
    if why := settings.why_not_vllm:
        return why
    if not policy.name_or_path or rows_before(policy):
        return "there is no checkpoint with all of the policy's weights"
    if getattr(policy, "hf_quantizer", None) is not None:
        return "the policy's weights are quantized"
    weights = sum(getattr(weight, "ds_numel", weight.numel()) * 2 for weight in policy.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    if weights > 0.8 * settings.vllm_gpu_memory_utilization * memory:
        return f"{settings.vllm_gpu_memory_utilization:g} of the GPU's memory is too little for the weights again"
    return None
