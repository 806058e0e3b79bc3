"""Switches off what a model does at random while it is trained.

TRL's own looks at modules of the class `nn.Dropout`. Models of transformers have more: attention, layers that are left
out, and the noise of a router take their rates from numbers that lie in a module or in its config.
"""

from __future__ import annotations

from torch import nn

_RATES = ("drop", "jitter_noise")


def disable_dropout(model: nn.Module) -> None:
    """Sets every rate of a model to 0, those in its config too: the finished model gets the ones it started with
    (models/saving.py)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and any(part in name for part in _RATES):
                    setattr(holder, name, 0.0)
