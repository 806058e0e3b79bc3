"""Checkpoints of DeepSpeed's ZeRO for other processes than wrote them, in the form that it calls universal.

https://www.deepspeed.ai/tutorials/universal-checkpointing/: a file for each weight and each of its moments, whoever
held which share of them. The checkpoint stays as it is; what is made of it is removed when the next one is saved.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import torch
from transformers import Trainer

from alignctl.run.checkpoints import STAGING, Checkpoint
from alignctl.trainers.base.moving_reference import REFERENCE

_CONVERTED = "converted"


def converted(trainer: Trainer, checkpoint: Checkpoint) -> Path:
    """A folder to continue from in place of the checkpoint; DeepSpeed is told to expect it. All processes call it
    together, before training."""
    folder = checkpoint.path.parent / STAGING / _CONVERTED
    if trainer.is_world_process_zero():
        _convert(checkpoint.path, folder)
    trainer.accelerator.wait_for_everyone()
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": True}
    return folder


def _convert(checkpoint: Path, folder: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        weights = file.suffix == ".safetensors" and not file.name.startswith(REFERENCE)
        if file.is_file() and not weights:  # DeepSpeed's own files have them, too
            shutil.copyfile(file, folder / file.name)  # no link: where room is looked for, staged files are written to
    step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    main(
        Namespace(
            input_folder=str(checkpoint / step),
            output_folder=str(folder / f"{step}_universal"),
            num_extract_workers=1,  # more would be processes that outlive this one
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # that of models whose layers have no patterns to be taken apart by, as here
        )
    )


def mend_loaded(trainer: Trainer, folder: Path) -> None:
    """Puts right what DeepSpeed (0.19.8) makes of the optimizer as it loads a converted checkpoint under ZeRO-3.

    It gives all groups of weights the settings of the first, weight decay among them, and one count of steps, which
    each group then counts up.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    optimizer = trainer.deepspeed.optimizer.optimizer
    (file,) = folder.glob("*_universal/zero/optimizer_state.pt")
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
