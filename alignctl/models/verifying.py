"""Reads saved weights before they count as saved: every tensor is there, has its shape, and holds numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from alignctl.errors import AlignctlError, first_few
from alignctl.models.bits import sum_of_bits
from alignctl.models.sharding import undivided


def check_saved(folder: Path, model: PreTrainedModel | PeftModel, sums: Mapping[str, int] | None = None) -> None:
    """Compares the weights in a folder with the model they were saved from; one tensor at a time is in memory.

    Args:
        sums: Of the bits of each tensor that was written, where these are compared as well.

    Raises:
        AlignctlError: Tensors are missing, empty, of another shape, hold NaN or infinite numbers, or other bits.
    """
    try:
        shapes, flaws = _read(folder, sums)
        if shapes:
            flaws += _differences(shapes, model) if isinstance(model, PeftModel) else _loaded_otherwise(folder, model)
    except SafetensorError as error:
        flaws = [f"a file is not whole: {error}"]
    if flaws:
        raise AlignctlError(
            f"the {'adapter' if isinstance(model, PeftModel) else 'model'} was not saved as it was trained: "
            f"{first_few(flaws, '; ')}",
            "it was removed again, the checkpoints are kept. Where numbers are not finite, training diverged: lower "
            "`learning_rate`. Else run the same command again, which only saves",
        )


def _read(folder: Path, sums: Mapping[str, int] | None = None) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all tensors in a folder, and what is wrong with their content.

    Raises:
        SafetensorError: A file is shorter or longer than it says.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    flaws = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if tensor.numel() == 0:
                    flaws.append(f"`{name}` is empty")
                elif not tensor.isfinite().all():
                    flaws.append(f"`{name}` holds NaN or infinite numbers")
                elif sums is not None and int(sum_of_bits(tensor)) != sums.get(name):
                    flaws.append(f"`{name}` holds other bits than were written")
    return shapes, flaws if shapes else ["there are no weights"]


def _loaded_otherwise(folder: Path, model: PreTrainedModel) -> Iterator[str]:
    """What `from_pretrained` would miss, leave or refuse: it knows which weights are tied, and which are saved under
    another name than the model has them. Loaded without memory for them."""
    with undivided():  # this process loads alone
        _, found = type(model).from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    for name, saved, expected in sorted(found["mismatched_keys"]):
        yield f"`{name}` has the shape {list(saved)}, not {list(expected)}"
    yield from (f"`{name}` is missing" for name in sorted(found["missing_keys"]))
    yield from (f"`{name}` is not a weight of this model" for name in sorted(found["unexpected_keys"]))


def _differences(shapes: dict[str, tuple[int, ...]], model: PeftModel) -> Iterator[str]:
    """How the tensors of an adapter differ from those it has in memory; an empty one there is another process's."""
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    for name, shape in expected.items():
        if name not in shapes:
            yield f"`{name}` is missing"
        elif 0 not in shape and shape != shapes[name]:
            yield f"`{name}` has the shape {list(shapes[name])}, not {list(shape)}"
    yield from (f"`{name}` is not a weight of this adapter" for name in shapes if name not in expected)
