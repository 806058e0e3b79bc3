"""What draws completions where `generation=auto`: found out with the model at hand, and kept for a continued run."""

from __future__ import annotations

import importlib.util

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from alignctl.models.vocabulary import rows_before
from alignctl.rollout.settings import RolloutSettings
from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json
from alignctl.stage.job import Job


def settle_generation(job: Job, policy: PreTrainedModel) -> None:
    """Puts what draws in the place of `auto`: what it was before, where the stage was begun, whatever has been
    installed since.

    Args:
        policy: Before an adapter is put on it.
    """
    args, path = job.args, job.paths.generation
    if getattr(args, "generation", None) != "auto":
        return
    kept = read_json(path)
    if kept is not None:
        args.generation, why = kept["generation"], "as it was begun"
    elif newest_checkpoint(job.paths.checkpoints) is not None:  # from before there was `auto`
        args.generation, why = "transformers", "as it was begun"
    else:
        why = why_not_vllm(policy, args, args.device)
        args.generation = "transformers" if why else "vllm"
    if kept is None and PartialState().is_main_process:
        write_json(path, {"generation": args.generation})
    job.progress.notice(f"completions are drawn by {args.generation}" + (f": {why}" if why else ""))


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
    if not policy.name_or_path or rows_before(policy):
        return "there is no checkpoint with all of the policy's weights"
    if getattr(policy, "hf_quantizer", None) is not None:
        return "the policy's weights are quantized"
    weights = sum(getattr(weight, "ds_numel", weight.numel()) * 2 for weight in policy.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    if weights > 0.8 * settings.vllm_gpu_memory_utilization * memory:
        return f"{settings.vllm_gpu_memory_utilization:g} of the GPU's memory is too little for the weights again"
    return None
