"""Keeps precomputed reference log-probabilities on disk, so that a sweep over beta pays for them once."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from alignctl.cache import note_use, private_dir
from alignctl.data.scanning import contents
from alignctl.engine.forward import evaluating

_COMPUTING = ("torch", "transformers", "trl")
# Columns of the tokenised rows; whatever else a row has does not change its log-probabilities.
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


class CachedReferenceLogps:
    """A mixin for TRL's preference trainers: what `_precompute_ref_logps` computes is looked up by content first.

    The key is the content of the reference's weights and config, and of the tokenised rows (so of data, template and
    tokenizer), the settings of length and precision, and the versions of what computes. `notices` says for people what
    was done; it comes from OnEngine, which stands behind this class.
    """

    notices: list[str]

    def __init__(self, *, args: Any, **kwargs: Any):
        # TRL (1.16) computes them before the model is divided.
        later = args.precompute_ref_log_probs and bool(args.fsdp)
        args.precompute_ref_log_probs &= not later
        super().__init__(args=args, **kwargs)
        if later:
            args.precompute_ref_log_probs = self.precompute_ref_logps = True
            self._precompute_model_hash = None
            self.train_dataset = self._precompute(self.train_dataset, "train", args.per_device_train_batch_size)
            if self.eval_dataset is not None:
                self.eval_dataset = self._precompute(self.eval_dataset, "eval", args.per_device_eval_batch_size)
        if self.precompute_ref_logps:
            self.ref_model = None  # its work is done

    def _precompute(self, rows: Dataset, name: str, batch_size: int) -> Dataset:
        return self._precompute_ref_logps(rows, name, self.args.precompute_ref_batch_size or batch_size)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if len(dataset) == 0:
            return dataset
        model = self.ref_model or self.model
        key = [_content_key(model, dataset, self.args, wanted=self.accelerator.is_main_process)]
        broadcast_object_list(key, from_process=0)
        file = private_dir("reference_logps") / f"{key[0]}.safetensors" if key[0] else None
        columns = _read(file, len(dataset)) if file else None
        if columns is None:
            # TRL has a cache of its own, by a fingerprint of the rows that knows neither lengths nor precision.
            marked = dataset.select(range(len(dataset)), new_fingerprint=key[0] or uuid.uuid4().hex)
            # A model that was made, and not loaded, has its dropout on; and what is drawn here, found ones do not draw.
            with evaluating(model), torch.random.fork_rng(devices=[]):
                computed = super()._precompute_ref_logps(marked, name, batch_size)
            columns = {column: computed[column] for column in computed.column_names if column not in dataset.features}
            if file and self.accelerator.is_main_process:
                _write(file, {column: torch.tensor(list(values)) for column, values in columns.items()})
            self.notices.append(
                f"reference log-probabilities of the {name} rows: computed" + (" and kept" if file else "")
            )
            return computed
        self.notices.append(f"reference log-probabilities of the {name} rows: found in {file}")
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset


def _content_key(model: nn.Module, dataset: Dataset, args: Any, wanted: bool) -> str | None:
    """Hash of all that the log-probabilities depend on; None where ZeRO-3 divides the weights, and in processes whose
    key is not looked at. All call it together, since FSDP2 gathers weights for it.

    Args:
        wanted: Whether this is the process whose key is.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    digest.update(
        json.dumps([config, [version(package) for package in _COMPUTING]], default=str, sort_keys=True).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name:  # the reference is the model without its adapter
            continue
        if tensor.numel() == 0:  # a shard of ZeRO-3
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if wanted:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if not wanted:
        return None
    for column in _TOKENS:
        if column in dataset.features:
            digest.update(column.encode())
            for content in contents(dataset, column):
                digest.update(content)
    settings = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16")
    digest.update(json.dumps([getattr(args, setting, None) for setting in settings]).encode())
    return digest.hexdigest()[:32]


def _read(file: Path, rows: int) -> dict[str, torch.Tensor] | None:
    """Columns of a file written before; None where there is none that can be used."""
    try:
        columns = load_file(file)
    except (OSError, SafetensorError):
        return None
    note_use(file)
    return columns if all(len(values) == rows for values in columns.values()) else None


def _write(file: Path, columns: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(f".{os.getpid()}")
    save_file(columns, staged)
    staged.replace(file)
