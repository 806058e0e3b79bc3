"""What `from_pretrained` did not find in a checkpoint: it goes on with random numbers and says so only in its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from alignctl.errors import RequestError, first_few


def check_all_loaded(source: str, model: PreTrainedModel, found: Mapping[str, Any], new_head: bool) -> None:
    """Whether all weights of a model come from its checkpoint.

    Args:
        source: Folder or Hub id of the checkpoint.
        found: What `from_pretrained` says besides with `output_loading_info`.
        new_head: Whether what lies over the base model may start at random.

    Raises:
        RequestError: Some do not.
    """
    body = f"{model.base_model_prefix}."
    mismatched = {name: (list(saved), list(expected)) for name, saved, expected in found["mismatched_keys"]}
    missing = sorted(name for name in found["missing_keys"] if name.startswith(body) or not new_head)
    unexpected = found["unexpected_keys"]
    if prefix := _common_prefix(missing, unexpected):
        raise RequestError(
            f"the weights in {source} are not found, because their names begin with `{prefix}`: it was saved with "
            "something around the model, such as torch.compile or DDP",
            "save the model inside it: `model._orig_mod.save_pretrained(FOLDER)` where it was compiled, `model.module` "
            "in place of `model._orig_mod` for DDP",
        )
    if missing:
        raise RequestError(
            f"{len(missing):,} weights of {type(model).__name__} are missing in {source}, and would be random numbers: "
            f"{first_few(missing)}",
            "name a checkpoint that is whole and of that kind of model",
        )
    if mismatched:
        shapes = [f"{name} is {saved}, not {expected}" for name, (saved, expected) in sorted(mismatched.items())]
        kind = type(model).__name__
        raise RequestError(
            f"{len(shapes):,} weights in {source} have another shape than {kind} takes: {first_few(shapes)}",
            "name a checkpoint whose config.json is that of its weights"
            + ("; a reward model has one score" if all(not name.startswith(body) for name in mismatched) else ""),
        )
    if errors := found["error_msgs"]:
        raise RequestError(f"{source} cannot be loaded: {first_few(list(errors))}")


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """What stands before the names of all weights that were not found."""
    pairs = ((name, one) for name in unexpected for one in missing if name.endswith(f".{one}"))
    return next((name.removesuffix(one) for name, one in pairs), None)
