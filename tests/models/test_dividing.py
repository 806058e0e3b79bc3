"""Models that FSDP2 divides: what loading one takes, what a checkpoint of one holds, and that all of it comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_script
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.train, pytest.mark.slow]

PROCESSES = 2
SMALL = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE = {"intermediate_size": 36, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
KINDS = {
    "llama": MORE, "qwen2": MORE, "gemma2": MORE, "phi3": MORE | {"pad_token_id": 0}, "gpt2": {}, "gpt_neox": {},
    "mixtral": MORE | {"num_local_experts": 3}, "qwen3_moe": MORE | EXPERTS,
}  # fmt: skip
"""Of models whose weights are renamed, joined or sorted into experts as they are read, or that have odd shapes."""
SCRIPT = """
import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoTokenizer

from alignctl.config.schema import ModelSettings
from alignctl.models.dividing import divide, processes_mesh, read_in_shares, set_shares_aside
from alignctl.models.loading import load_model
from alignctl.models.shared_files import load_state, load_weights, save_state, save_weights

here, tokenizer = map(Path, sys.argv[1:])
torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()


def own_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def watch():
    while not done.is_set():
        seen.append(own_bytes())
        time.sleep(0.001)


tokenizer = AutoTokenizer.from_pretrained(tokenizer)
mesh = processes_mesh(torch.device("cpu"))
settings = ModelSettings(path=str(here / "model"))
done, seen, before = threading.Event(), [], own_bytes()
watching = threading.Thread(target=watch)
watching.start()
with read_in_shares(mesh):
    model = load_model(settings, "policy", settings.path, tokenizer, {"type": "none"}, 0, trained=True)
set_shares_aside(model)
divide(model, mesh)
done.set()
watching.join()

optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
model(torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
optimizer.step()
saved = here / "saved"
saved.mkdir(exist_ok=True)
save_weights(model, saved)
save_state(model, optimizer, saved)
kept = [p.to_local().clone() for p in model.parameters()]
moments = [optimizer.state[p]["exp_avg"].to_local().clone() for p in model.parameters()]
optimizer.step()
load_weights(model, saved)
load_state(model, optimizer, saved)
back = all(torch.equal(p.to_local(), one) for p, one in zip(model.parameters(), kept, strict=True))
state = [optimizer.state[p]["exp_avg"].to_local() for p in model.parameters()]
back = back and all(torch.equal(one, other) for one, other in zip(state, moments, strict=True))
others = {}
for folder in sorted((here / "others").iterdir()):
    for role in ("policy", "reward_model"):
        settings = ModelSettings(path=str(folder))
        arguments = settings, role, settings.path, tokenizer, {"type": "none"}, 0
        whole = load_model(*arguments, trained=True)
        with read_in_shares(mesh):
            divided = load_model(*arguments, trained=True)
        in_shares = any(hasattr(p, "placements") for p in divided.parameters())
        set_shares_aside(divided)
        divide(divided, mesh)
        expected = dict(whole.named_parameters())
        same = all(torch.equal(p.full_tensor(), expected.pop(name)) for name, p in divided.named_parameters())
        ids = torch.tensor([[1, 2, 3, 4]])
        divided.config.get_text_config().pad_token_id = whole.config.get_text_config().pad_token_id = 0
        with torch.no_grad():
            apart = (divided(ids).logits - whole(ids).logits).abs().max()
        others[f"{folder.name} {role}"] = in_shares, same and not expected, float(apart)

own = sum(p.to_local().nbytes for p in model.parameters())
facts = {"loading": max(seen) - before, "own": own, "back": back, "others": others}
(here / f"facts_{rank}.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def divided(tmp_path_factory, shared_data):
    """A model of 38 million weights in bfloat16, 151 MB in float32: its folder, and what each process says."""
    here = tmp_path_factory.mktemp("divided")
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(here / "model")
    for kind, more in KINDS.items():
        small = AutoConfig.for_model(kind, **SMALL, **more)
        AutoModelForCausalLM.from_config(small).save_pretrained(here / "others" / kind)
    run_script(SCRIPT, here, here, shared_data / "models" / "stories260K", processes=PROCESSES)
    return here, [json.loads((here / f"facts_{rank}.json").read_text()) for rank in range(PROCESSES)]


def weights_of(here: Path) -> int:
    """Bytes of all weights in float32."""
    return 2 * sum(weight.nbytes for weight in load_file(here / "model" / "model.safetensors").values())


def test_a_process_loads_its_share(divided):
    here, facts = divided
    largest = 4 * 8192 * 512
    for one in facts:
        assert one["own"] == pytest.approx(weights_of(here) / PROCESSES, rel=1e-3)
        assert one["loading"] <= 1.05 * weights_of(here) / PROCESSES + largest


def test_a_checkpoint_has_each_weight_once_and_each_process_writes_its_share(divided):
    here, _ = divided
    whole = weights_of(here)
    files = [file for file in (here / "saved").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3.05 * whole
    weights = sorted((here / "saved").glob("*.safetensors"))
    states = sorted((here / "saved" / "optimizer").glob("*.safetensors"))
    assert len(weights) == len(states) == PROCESSES
    for file in weights:
        assert file.stat().st_size <= 1.1 * whole / PROCESSES
        assert "lm_head.weight" not in load_file(file)  # tied to the embeddings
    for file in states:
        assert file.stat().st_size <= 1.1 * 2 * whole / PROCESSES


def test_weights_and_state_come_back(divided):
    _, facts = divided
    assert all(one["back"] for one in facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["policy", "reward_model"])
def test_shares_are_those_of_the_whole_model(divided, kind, role):
    """A reward model's new head starts with the same random numbers, too."""
    _, facts = divided
    for one in facts:
        in_shares, same, apart = one["others"][f"{kind} {role}"]
        assert in_shares
        assert same
        assert apart < 1e-6
