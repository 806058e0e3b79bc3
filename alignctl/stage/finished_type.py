"""The type that a stage saves its model in, for the room on the disk and for saving."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from alignctl.config.weights import saved_tensors, saved_type
from alignctl.run.files import read_json
from alignctl.run.paths import PRODUCT_MANIFEST
from alignctl.stage.job import Job

# Types that a model is saved in; a checkpoint may have others, of 8 bits for instance.
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_type(job: Job) -> str | None:
    """The type of the weights that the first stage before this one started from; None where it is not known."""
    if job.start is None:
        return None
    if job.stage.start_from:
        return (read_json(Path(job.start, PRODUCT_MANIFEST)) or {}).get("checkpoint_type")
    if tensors := saved_tensors(Path(job.start)):
        return saved_type(tensors)
    settings = job.stage.model
    config = AutoConfig.from_pretrained(
        job.start, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    return str(config.dtype).removeprefix("torch.") if config.dtype else None


def finished_type(job: Job) -> torch.dtype | None:
    """What the finished model is saved in; None for what it was trained in, which a later stage goes on from."""
    wanted = job.stage.model.save_dtype
    if wanted == "auto":
        wanted = None if job.stage.taken_by else checkpoint_type(job)
    return _TYPES.get(wanted)
