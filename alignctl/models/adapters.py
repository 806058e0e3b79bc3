"""Several adapters of peft over one model. The only place that knows how peft's layers hold which of them is active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor

from alignctl.errors import AlignctlError, RequestError

_HEADS = ("score.weight", "score.bias")


class Adapters:
    """The adapters of a model; to be made when all of them are on it."""

    def __init__(self, model: PeftModel):
        self.model = model
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [layer for layer in model.modules() if isinstance(layer, kinds)]

    @contextmanager
    def under(self, name: str | None) -> Iterator[None]:
        """The model with one of its adapters, None for none, and afterwards with the one it had.

        peft's own `set_adapter` and `disable_adapter` also change which weights are trained; here that stays.
        """
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = name or layer._active_adapter, name is None
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `context_fn` of torch's checkpoint: what is computed again in the backward pass is computed under the
        adapter that is active now."""
        layer = self._layers[0]
        return nullcontext(), self.under(None if layer._disable_adapters else layer.active_adapters[0])


@dataclass(frozen=True)
class ScoreAdapter:
    """An adapter that was trained with a head which scores, as a reward stage saves it."""

    config: PeftConfig
    weights: dict[str, Tensor]
    head: dict[str, Tensor]
    """`weight` `[1, width]`, and `bias` where it has one."""

    def put_on(self, model: PeftModel, name: str) -> None:
        """Adds the adapter to a causal language model under a name, without its head.

        Raises:
            AlignctlError: It is of another model.
        """
        whole = [part for part in self.config.modules_to_save or () if any(f".{part}." in key for key in self.weights)]
        # Some ways of starting an adapter change the weights under it.
        plain = {"task_type": "CAUSAL_LM", "inference_mode": False, "init_lora_weights": True}
        model.add_adapter(name, replace(self.config, **plain, modules_to_save=whole or None))
        try:
            unexpected = set_peft_model_state_dict(model, dict(self.weights), name).unexpected_keys
        except RuntimeError as error:  # shapes
            raise AlignctlError(f"the reward model's adapter does not fit the base: {error}") from error
        if unexpected:
            raise AlignctlError(f"the reward model's adapter does not fit the base, which has no {unexpected[0]}")


def load_score_adapter(source: str, base: str | None) -> ScoreAdapter:
    """Loads the adapter of a reward model.

    Args:
        source: Folder or Hub id.
        base: Folder or Hub id of the weights it is put on.

    Raises:
        AlignctlError: There is none, or it is of another base or without a head.
    """
    try:
        config = PeftConfig.from_pretrained(source)
        if Path(source).is_dir():
            file = str(Path(source, SAFETENSORS_WEIGHTS_NAME))
        else:
            file = hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME)
        weights = load_file(file)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise AlignctlError(f"cannot load an adapter from {source}: {reason}") from error
    if not Path(source).is_dir() and config.base_model_name_or_path != base:
        raise RequestError(
            f"the adapter {source} is of {config.base_model_name_or_path}, and the policy starts from {base}",
            "with `sharing=shared_base` both need the same base",
        )
    head = {key.rpartition(".")[2]: weights.pop(key) for key in list(weights) if key.endswith(_HEADS)}
    if "weight" not in head:
        raise AlignctlError(f"the adapter {source} has no head `score`: it is no reward model's")
    return ScoreAdapter(config, weights, head)
