"""Processes that would train, or have trained, models of their own are ended."""

from __future__ import annotations

import pytest
from support.processes import run_script

pytestmark = pytest.mark.train

SCRIPT = """
import pytest
import torch
from accelerate import Accelerator

from alignctl.trainers.base.replicas import check_same, check_wrapped

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = torch.nn.Linear(4, 4).to(torch.bfloat16)
with pytest.raises(RuntimeError, match="2 processes would each train a model of their own: Linear is no"):
    check_wrapped(model, accelerator)
prepared = accelerator.prepare(model)  # which gives all the weights of the first
check_wrapped(prepared, accelerator)
model.register_buffer("seen", torch.zeros(2))
optimizer = torch.optim.AdamW(model.parameters())
prepared(torch.ones(1, 4, dtype=torch.bfloat16) * accelerator.process_index).sum().backward()
optimizer.step()
check_same(model, accelerator, "after a step", optimizer)
own = float(accelerator.process_index)
for tensor, words in (
    (model.weight.data, "the weights differ between processes after a step"),
    (model.seen, "the buffers differ"),
    (optimizer.state[model.weight]["exp_avg"], "the state of the optimizer differ"),
):
    kept = tensor.clone()
    tensor[0] += own
    with pytest.raises(RuntimeError, match=words):
        check_same(model, accelerator, "after a step", optimizer)
    tensor.copy_(kept)
model.requires_grad_(False).weight[1, 2] += own
with pytest.raises(RuntimeError, match="the weights differ"):  # also those that are not trained
    check_same(model, accelerator, "after a step")
accelerator.wait_for_everyone()  # none leaves while another still listens to it
"""


def test_two_processes(tmp_path):
    run_script(SCRIPT, tmp_path, processes=2)
