"""Schedule-free optimizers, arXiv:2405.15682: the model is an average of the weights that training moves.

The optimizer has both, and `optimizer.eval()` and `.train()` turn the one into the other. The average is what is
measured, saved and finished with. Turned forth and back weights are rounded; they are put back as they were, so that
neither an evaluation nor a checkpoint changes anything about training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FILE = "training_weights.safetensors"


class KeepsAverages:
    """Mixin before CompleteCheckpoints and a transformers Trainer; with other optimizers it does nothing."""

    _moved: dict[str, Tensor] | None = None
    """While the model is the average: what training goes on with."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._averaged():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._moved is not None and self.args.should_save:
            save_file(self._moved, Path(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and is_schedule_free(self.args):
            self.optimizer.train()
            self._put(load_file(Path(checkpoint, _FILE)))

    def _finalize_training(self, *args: Any) -> Any:
        if is_schedule_free(self.args):
            self.optimizer.eval()
        return super()._finalize_training(*args)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model as it would be finished with."""
        if not (is_schedule_free(self.args) and self.is_in_train):
            yield
            return
        trained = self._trained()
        self._moved = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in trained.items()}
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            self._put(self._moved)
            self._moved = None

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self._trained().items():
            weight.copy_(weights[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def is_schedule_free(args: Any) -> bool:
    """Whether a trainer's optimizer is one."""
    return str(args.optim.value).startswith("schedule_free")
