"""A reference to compare a policy with, for the time that it is compared: where it comes from is the caller's choice.

with adapter_off(policy) as reference: ...
with loaded_beside(policy, load) as reference: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from peft import PeftModel
from transformers import PreTrainedModel

from alignctl.engine.forward import takes_packed_rows
from alignctl.models.adapters import Adapters
from alignctl.models.packing import put_packed_attention_on

Reference = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Gives the reference model for the time of a `with` block."""


@contextmanager
def adapter_off(policy: PeftModel) -> Iterator[PreTrainedModel]:
    """What an adapter was put on: the policy itself, with the adapter switched off."""
    with Adapters(policy).under(None):
        yield policy


@contextmanager
def loaded_beside(policy: PreTrainedModel, load: Callable[[], PreTrainedModel]) -> Iterator[PreTrainedModel]:
    """A model of its own, on the policy's device and taking packed rows where the policy does.

    Args:
        load: Loads its weights; called when the block is entered.
    """
    model = load()
    if takes_packed_rows(policy):
        put_packed_attention_on(model, policy.device)
    yield model.to(policy.device).eval()
