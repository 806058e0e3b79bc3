"""The models of a stage's roles, loaded as its settings and its tokenizer want them, for build, measure and save."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignctl.config.adapters import looks_at_base
from alignctl.methods.registry import Role
from alignctl.models.dividing import divide, processes_mesh, read_in_shares, set_shares_aside
from alignctl.models.loading import load_model
from alignctl.stage.job import Job
from alignctl.trainers.base.mixed import mixed_dtype


def load(
    job: Job,
    role: Role,
    source: str | None,
    trained: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """The model of a role from a folder or Hub id; None for random weights. Under FSDP2 each process reads its share of
    one that learns, which the trainer divides; others are divided.

    Args:
        trained: Whether it is one that learns.
        tokenizer: What it is given tokens by, where that is not the stage's.
        notice: Is told what people should know of how it was loaded.
    """
    stage = job.stage
    mesh = None
    if stage.distributed.type == "fsdp2":
        mesh = processes_mesh(job.args.device, stage.distributed.tp_size, job.args.ddp_timeout)
    whole = trained and looks_at_base(stage.peft)
    with read_in_shares(None if whole else mesh):
        model = load_model(
            stage.model,
            role,
            source,
            tokenizer or job.tokenizer,
            stage.peft,
            stage.seed,
            trained=trained,
            new_tokens=job.new_to(source),
            notice=notice,
        )
    set_shares_aside(model)
    if mesh is not None and not trained:
        divide(model.requires_grad_(False), mesh, mixed_dtype(job.args))
    return model


def load_under_adapter(job: Job) -> PreTrainedModel:
    """What the adapter of a stage is merged into: the weights as the checkpoint has them, or those that the checkpoint
    was quantized from."""
    stage = job.stage
    whole = stage.model.merge_into if stage.start_from is None else None
    return load_model(
        stage.model,
        job.method.trained,
        whole or job.start,
        job.tokenizer,
        {"type": "lora"},
        stage.seed,
        trained=True,
        new_tokens=job.new_tokens,
    )
