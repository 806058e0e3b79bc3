"""A reference that follows the policy, TRL's `sync_ref_model` (arXiv:2404.09656): part of a checkpoint, as what the
optimizer keeps is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from alignctl.models.sharding import to_write, whole_state
from alignctl.run.checkpoints import Checkpoint

REFERENCE_FILE = "reference.safetensors"


class KeepsReference:
    """Mixin before CompleteCheckpoints and a transformers Trainer; a reference that stays where it is is not saved."""

    def _take_over_ended(self, checkpoint: Checkpoint) -> None:
        super()._take_over_ended(checkpoint)
        if moves(self.args):
            self._load_reference(checkpoint.path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not moves(self.args):
            return
        model = self.accelerator.unwrap_model(self.ref_model)
        weights = dict(model.named_parameters())  # weights that are tied once
        whole = whole_state(model)
        if self.args.should_save:
            state = {name: (weights if whole is None else whole)[name].detach().cpu().contiguous() for name in weights}
            save_file(state, Path(output_dir, REFERENCE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and moves(self.args):
            self._load_reference(Path(checkpoint))

    @torch.no_grad()
    def _load_reference(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.ref_model)
        kept = load_file(folder / REFERENCE_FILE)
        with to_write(model) as writes:
            if writes:
                for name, weight in model.named_parameters():
                    weight.copy_(kept[name])


def moves(args: Any) -> bool:
    """Whether a trainer's reference follows its policy."""
    return bool(getattr(args, "sync_ref_model", False))
