"""Models whose layers' matrices two processes divide compute what whole ones do, forwards and backwards."""

from __future__ import annotations

import json

import pytest
from support.processes import run_script

pytestmark = [pytest.mark.train, pytest.mark.slow]

SMALL = {
    "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 36, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}, "gemma2": {}, "mistral": {},
    "smollm3": {}, "cohere": {},
}  # fmt: skip
"""Of models with biases, with norms of single heads, and with a head that is tied to the embeddings."""
REFUSED = {
    "gpt2": ({}, "transformers does not say how the layers of models of type `gpt2` are divided"),
    "phi3": ({}, "layers of models of type `phi3` are divided in a way that alignctl does not know"),
    "mixtral": (
        {"num_local_experts": 2},
        "layers of models of type `mixtral` are divided in a way that alignctl does not know",
    ),
    "apertus": ({}, "layers of models of type `apertus` have other weights between their matrices (`act_fn.alpha_"),
    "llama": ({"num_key_value_heads": 1}, "it does not divide the heads of the model, 1 (`num_key_value_heads`)"),
    "qwen2": ({"intermediate_size": 35}, "it does not divide the 35 columns between two matrices of a layer"),
}
SCRIPT = """
import copy
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from alignctl.errors import RequestError
from alignctl.models.dividing import divide, processes_mesh
from alignctl.trainers.base.replicas import check_same

torch.set_num_threads(1)
distributed.init_process_group("gloo")
mesh = processes_mesh(torch.device("cpu"), tp_size=2)
given, found = json.loads(Path(sys.argv[1]).read_text()), {}


def made(kind, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more))
    for parameter in model.parameters():  # biases of 0 would show nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return model


for kind, more in given["kinds"].items():
    whole, divided = (made(kind, more) for _ in range(2))
    divide(divided, mesh)
    losses = []
    for model in (whole, divided):
        model.train()
        ids = torch.arange(1, 25).view(2, 12)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
    expected = dict(whole.named_parameters())
    own = sum(p.to_local().numel() for p in divided.parameters()) / sum(p.numel() for p in expected.values())
    apart = {}
    for name, parameter in divided.named_parameters():
        gradient, theirs = parameter.grad.full_tensor(), expected.pop(name).grad
        apart[name] = float((gradient - theirs).norm() / theirs.norm())
    found[kind] = {"losses": losses, "apart": apart, "missing": list(expected), "own": own}
accelerator = Accelerator(cpu=True)
check_same(divided, accelerator, "before")
with torch.no_grad():  # what both hold of the last of the models
    divided.model.layers[1].input_layernorm.weight.to_local().add_(distributed.get_rank())
try:
    check_same(divided, accelerator, "now")
except RuntimeError as error:
    differ = str(error)
refused = {}
for kind, more in given["refused"].items():
    try:
        divide(made(kind, more), mesh)
    except RequestError as error:
        refused[kind] = str(error)
if distributed.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps({"kinds": found, "refused": refused, "differ": differ}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    here = tmp_path_factory.mktemp("matrices")
    given = {
        "kinds": {kind: SMALL | more for kind, more in KINDS.items()},
        "refused": {kind: SMALL | more for kind, (more, _) in REFUSED.items()},
    }
    (here / "given.json").write_text(json.dumps(given))
    run_script(SCRIPT, here, here / "given.json", here / "found.json", processes=2)
    return json.loads((here / "found.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_model(found, kind):
    one = found["kinds"][kind]
    expected, loss = one["losses"]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert not one["missing"]
    assert max(one["apart"].values()) < 1e-4, one["apart"]  # sums of float32 in another order


def test_what_both_hold_of_a_layer_is_compared(found):
    assert "the shares differ between processes now" in found["differ"]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_divided_is_refused(found, kind):
    assert f"`distributed.parallelism_config.tp_size=2` cannot be: {REFUSED[kind][1]}" in found["refused"][kind]
