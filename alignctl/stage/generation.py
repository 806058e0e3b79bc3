"""What draws completions where `generation=auto`: found out with the model at hand, and kept for a continued run."""

from __future__ import annotations

from accelerate import PartialState
from transformers import PreTrainedModel

from alignctl.run.checkpoints import newest_checkpoint
from alignctl.run.files import read_json, write_json
from alignctl.stage.job import Job
from alignctl.trainers.on_policy.choosing import why_not_vllm


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
