"""The parts of layers compiled: the same numbers, one compilation for all layers, and what cannot be compiled stays."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.files import read, weights
from support.in_process import StopsAfter, run_stages
from support.methods import small_run
from support.models import tiny
from support.rewards import REWARDS

from alignctl.engine.forward import last_hidden
from alignctl.engine.head import compiled
from alignctl.engine.layout import pack, pad
from alignctl.errors import RequestError, Stopped
from alignctl.methods.registry import methods, resolve
from alignctl.models import compiling
from alignctl.models.compiling import compile_layers
from alignctl.models.packing import put_packed_attention_on

pytestmark = pytest.mark.train
CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch):
    """All of torch.compile but the code that it would write, which takes a C++ compiler several seconds."""
    torch._dynamo.reset()
    compiled.cache_clear()
    monkeypatch.setattr(compiling, "_BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()
    compiled.cache_clear()


def rows(seed):
    """A pair of sequences that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    shared, *own = (int(one) for one in torch.randint(4, 20, (3,), generator=generator))
    first = torch.randint(3, 60, (shared,), generator=generator)
    return [torch.cat([first, torch.randint(3, 60, (length,), generator=generator)]) for length in own]


def graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def gradient_of(model, layout):
    model.zero_grad()
    hidden = last_hidden(model, layout)
    hidden.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), torch.cat(gradients)


@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.night) for name in ("qwen3", "gpt2", "granite"))]
)
def test_the_same_numbers_with_one_compilation_for_all_layers_and_lengths(traced, model_type):
    sizes = {"n_embd": 32, "n_head": 4} if model_type == "gpt2" else {}
    counts = []
    for layers in (2, 3):
        torch._dynamo.reset()
        depth = {"n_layer" if model_type == "gpt2" else "num_hidden_layers": layers}
        plain, model = (tiny(model_type, **depth, **sizes).train() for _ in range(2))
        for one in (plain, model):
            assert put_packed_attention_on(one, CPU) is None
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for module in one.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        names = list(model.state_dict())
        assert compile_layers(model, CPU) is None
        assert list(model.state_dict()) == names
        before = graphs()
        for seed in range(3):
            pair = rows(seed)
            for layout in (pack(pair, [(0, 1)]), pad(pair)):
                for found, expected in zip(gradient_of(model, layout), gradient_of(plain, layout), strict=True):
                    assert (found - expected).norm() <= 1e-5 * expected.norm()
        counts.append(graphs() - before)
    assert counts[0] == counts[1] > 0


def test_generation_is_as_it_was(traced):
    plain, model = tiny(), tiny()
    assert compile_layers(model, CPU) is None
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_what_torch_cannot_compile_stays_as_it_was(monkeypatch):
    def refuses(graph, inputs):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(compiling, "_BACKEND", refuses)
    model = tiny()
    assert "torch cannot compile models of type `llama`" in compile_layers(model, CPU)
    layout = pad(rows(0))
    assert torch.equal(last_hidden(model, layout), last_hidden(tiny(), layout))
    # a model that is not on its device yet is not tried out: it is found in the first pass
    assert compile_layers(model, torch.device("cuda")) is None
    assert torch.equal(last_hidden(model, layout), last_hidden(tiny(), layout))


def test_what_is_not_compiled():
    quantized = tiny()
    weight = quantized.model.layers[0].mlp.up_proj.weight
    quantized.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    assert compile_layers(quantized, CPU) == "the weights are quantized"
    experts = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1)
    assert compile_layers(experts, CPU) == "every text takes other experts of a layer"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("dpo", {"activation_checkpointing": True}, marks=pytest.mark.night),
        pytest.param("kto", {"engine": "padded"}, marks=pytest.mark.night),
        pytest.param("sft", {}, marks=pytest.mark.night),
        ("reward", {}),
    ],
)
def test_training_gives_the_same_numbers(traced, small, name, settings):
    options = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2} | settings
    logs = []
    for wanted in ("on", "off"):
        trainer = small.trainer(name, compile=wanted, **options)
        assert any(notice.startswith("compile: the parts") for notice in trainer.notices) == (wanted == "on")
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_an_adapter_and_what_is_under_it(traced, small):
    """The reference is the policy with its adapter switched off, in the same parts."""
    from peft import LoraConfig, get_peft_model

    logs = []
    for wanted in (True, False):  # as YAML reads `on` and `off`
        torch.manual_seed(0)
        model = get_peft_model(small.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        options = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2}
        method = methods()["dpo"]
        args = small.arguments(resolve(method.config_class), compile=wanted, **options)
        trainer = resolve(method.trainer)(
            model=model, args=args, train_dataset=small.rows("preferences"), processing_class=small.tokenizer
        )
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert logs[0][0] == pytest.approx(0.693147, abs=1e-6)
    assert logs[0][2] < logs[0][0]


def test_on_is_refused_where_it_cannot_be(small, monkeypatch):
    monkeypatch.setattr(compiling, "_why_not", lambda model, parts: "the weights are quantized")
    with pytest.raises(RequestError, match="`compile=on` cannot be: the weights are quantized"):
        small.trainer("sft", compile="on")


def test_a_cpu_compiles_nothing_by_itself(small):
    trainer = small.trainer("sft")
    assert not any("compile" in notice for notice in trainer.notices)
    assert all(module._compiled_call_impl is None for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("name", "backend"),
    [("dpo", "inductor"), ("ppo", "inductor"), ("dpo", "aot_eager")],
)
@pytest.mark.night
def test_a_whole_stage_continued(traced, tmp_path, monkeypatch, name, backend):
    monkeypatch.setenv("ALIGNCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_BACKEND", backend)
    more = ("peft=lora",) if name == "dpo" else (f"ppo.reward_funcs=[{REWARDS}:length]",)
    arguments = small_run(name, *more, "rehearse=false", max_steps=4, logging_steps=1, save_steps=2)
    plain = run_stages(tmp_path / "plain", *arguments) / name
    arguments = (*arguments, f"{name}.compile=on")
    whole = run_stages(tmp_path / "whole", *arguments) / name
    with pytest.raises(Stopped):
        run_stages(tmp_path / "parts", *arguments, signal=StopsAfter(2))
    parts = run_stages(tmp_path / "parts", *arguments) / name
    assert "compile: the parts of each layer, once for all layers" in read(parts / "progress.json")["notices"]
    assert weights(parts / "model") == weights(whole / "model")
    losses = [[row["loss"] for row in read(stage / "metrics.jsonl") if "loss" in row] for stage in (plain, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    names = [sorted(load_file(stage / "model" / "model.safetensors")) for stage in (plain, whole)]
    assert names[0] == names[1]


def test_a_forward_of_its_own_is_called(traced):
    """transformers puts Liger's on the parts of a model when training begins."""
    model, called = tiny(), []
    assert compile_layers(model, CPU) is None
    for part in (layer.mlp for layer in model.model.layers):
        own = part.forward
        part.forward = lambda x, own=own: called.append(1) or own(x)
    model(input_ids=torch.arange(4, 24)[None])
    assert len(called) == len(model.model.layers)
