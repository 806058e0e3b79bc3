"""Runs jobs as scripts/run_many.py does, and writes down how many bytes each process kept for a backward pass at most,
beside weights; not where they are divided."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from alignctl.engine.forward import is_divided

usual = Trainer.training_step


def training_step(self: Trainer, model: torch.nn.Module, *args: Any, **options: Any) -> Tensor:
    if is_divided(model):
        return usual(self, model, *args, **options)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = usual(self, model, *args, **options)
    file = Path(self.args.output_dir).parent / f"kept_{os.environ.get('RANK', 0)}.json"
    before = json.loads(file.read_text()) if file.is_file() else 0
    file.write_text(json.dumps(max(before, sum(kept.values()))))
    return loss


Trainer.training_step = training_step
runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "run_many.py"), run_name="__main__")
