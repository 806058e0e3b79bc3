"""Saves the finished model of a stage, and its adapter, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import alignctl
from alignctl.models.verifying import check_saved
from alignctl.run.files import publish_folder, write_json
from alignctl.run.fingerprint import listed
from alignctl.run.paths import PRODUCT_MANIFEST, StagePaths


def save_finished(
    trained: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: StagePaths,
    load_whole: Callable[[], PreTrainedModel],
    facts: Mapping[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Saves a trained model, whole or not at all, for `from_pretrained(paths.model)` of its class.

    An adapter is saved by itself and then merged: the next stage starts from, and is compared with, the whole model.

    Args:
        load_whole: Gives the weights under the adapter as the checkpoint has them, where those of `trained` will not
            do: merging into 4 bits would round the adapter away, and a share of them is not all.
        facts: JSON files to put beside the weights, by name.
        state: The weights, where those of `trained` are divided among processes.

    Raises:
        AlignctlError: What was written is not what was trained; none of it is left.
    """
    if isinstance(trained, PeftModel):
        _publish(paths.adapter, trained, tokenizer, facts, state)
        if state is not None or getattr(trained, "is_loaded_in_4bit", False):
            trained, state = PeftModel.from_pretrained(load_whole(), paths.adapter), None
        trained = trained.merge_and_unload()
    _publish(paths.model, trained, tokenizer, facts, state)


def _publish(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Any],
    state: dict[str, Tensor] | None,
) -> None:
    staged = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staged, ignore_errors=True)
    options: dict[str, Any] = {} if state is None else {"state_dict": state}
    if isinstance(model, PeftModel):
        options["selected_adapters"] = ["default"]  # others may have been trained beside it
    try:
        model.save_pretrained(staged, **options)
        check_saved(staged, model)
        tokenizer.save_pretrained(staged)
        for name, content in facts.items():
            (staged / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        made = {"product": "model", "stage": folder.parent.name, "alignctl": alignctl.__version__}
        write_json(staged / PRODUCT_MANIFEST, made | {"files": listed(staged)})
        publish_folder(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
