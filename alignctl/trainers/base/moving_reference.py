"""A reference that follows the policy, TRL's `sync_ref_model` (arXiv:2404.09656): part of a checkpoint, as what the
optimizer keeps is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from alignctl.engine.forward import is_divided
from alignctl.models.layers import layers_of, read_layers, write_layers
from alignctl.run.checkpoints import Checkpoint

REFERENCE = "reference"
"""Of its files, what their names begin with."""


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
        weights = self._reference_weights()
        if is_divided(self.ref_model):
            write_layers(Path(output_dir), REFERENCE, layers_of(weights), by_all=True)
        elif self.args.should_save:
            content = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
            save_file(content, Path(output_dir, f"{REFERENCE}.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and moves(self.args):
            self._load_reference(Path(checkpoint))

    def _load_reference(self, folder: Path) -> None:
        read_layers(folder, REFERENCE, self._reference_weights())

    def _reference_weights(self) -> dict[str, nn.Parameter]:
        """Weights that are tied once."""
        return dict(self.accelerator.unwrap_model(self.ref_model).named_parameters())


def moves(args: Any) -> bool:
    """Whether a trainer's reference follows its policy."""
    return bool(getattr(args, "sync_ref_model", False))
