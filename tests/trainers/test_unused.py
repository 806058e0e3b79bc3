"""Where DDP has to look for weights without a gradient."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from alignctl.methods.registry import methods

pytestmark = pytest.mark.train


@pytest.mark.parametrize("name", [name for name, method in methods().items() if method.data_kind != "prompts"])
def test_every_weight_is_used(small, name):
    assert not small.trainer(name)._may_leave_unused()


def test_a_weight_that_nothing_comes_of(small):
    model = small.model
    model.model.spare = nn.Linear(2, 2)
    assert small.trainer("sft", model=model)._may_leave_unused()


def test_experts_may_have_no_tokens(small):
    config = MixtralConfig(
        **small.config().to_dict() | {"num_local_experts": 2, "num_experts_per_tok": 1, "architectures": None}
    )
    assert small.trainer("sft", model=MixtralForCausalLM(config))._may_leave_unused()
