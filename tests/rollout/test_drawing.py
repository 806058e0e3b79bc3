"""What may draw PPO's completions: transformers in batches or continuously, and how vLLM would be called."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.files import read
from support.in_process import StopsAfter, run_stages
from support.models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignctl.engine.forward import takes_packed_rows
from alignctl.errors import NotANumber, Stopped
from alignctl.models.packing import put_packed_attention_on
from alignctl.rollout.drawing import draw_completions
from alignctl.rollout.settings import RolloutSettings
from alignctl.run.files import read_json, write_json
from alignctl.run.paths import StagePaths
from alignctl.trainers.on_policy.choosing import why_not_vllm
from alignctl.trainers.on_policy.group.config import GRPOConfig
from alignctl.trainers.on_policy.ppo.config import PPOConfig

pytestmark = pytest.mark.train
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

TEXTS = ["Once upon a time", "The", "Lily and Tom were in the park, and", "One day, a", "She said", "It was a big red"]


@pytest.fixture
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 0
    return model, tokenizer


SEEDS = range(1500)


def settings(count, temperature, tokens=4096, generation="continuous"):
    return RolloutSettings(response_length=count, temperature=temperature, rollout_tokens=tokens, generation=generation)


def drawn_both_ways(model, tokenizer, texts, count, temperature):
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    for generation in ("transformers", "continuous"):
        torch.manual_seed(0)
        yield draw_completions(model, tokenizer, prompts, settings(count, temperature, generation=generation), SEEDS)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_say_what_is_most_likely(stories, adapter, packed):
    model, tokenizer = stories
    if packed:
        assert put_packed_attention_on(model, torch.device("cpu")) is None
    before = model.config._attn_implementation
    if adapter:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules="all-linear")).eval()
    in_batches, continuously = drawn_both_ways(model, tokenizer, TEXTS, 24, 1e-3)
    assert continuously == in_batches
    assert takes_packed_rows(model) == packed
    bare = model.get_base_model() if adapter else model
    assert bare.config._attn_implementation == before


def padded(model, rows, ids):
    """With more embeddings than tokens: the last ones are as likely after some ids as those that are the likeliest."""
    with torch.no_grad():
        likely = model(input_ids=ids).logits[0, -1].topk(rows - model.config.vocab_size).indices
    head, before = model.lm_head.weight.detach().clone(), model.config.vocab_size
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[before:] = head[likely]
    return model


@pytest.mark.parametrize("adapter", [False, True])
def test_ids_without_a_token_are_never_drawn(stories, adapter):
    model, tokenizer = stories
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    model = padded(model, 576, ids)
    with torch.no_grad():
        assert model(input_ids=ids).logits[0, -1].softmax(-1)[512:].sum() > 0.4
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    for drawn in drawn_both_ways(model, tokenizer, TEXTS, 24, 1.0):
        assert max(token for completion in drawn.completions for token in completion) < 512


@pytest.mark.parametrize("generation", ["transformers", "continuous"])
def test_nothing_is_drawn_from_what_is_no_number(stories, generation):
    model, tokenizer = stories
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NotANumber, match="no answer can be drawn"):
        draw_completions(model, tokenizer, [[1, 5]], settings(4, 1.0, generation=generation), SEEDS)


def test_vllm_is_told_which_ids_are_tokens():
    from alignctl.rollout.vllm import helper_settings

    given = PPOConfig(output_dir="unused", use_cpu=True)
    assert helper_settings(given, 8, [2])["generation_kwargs"] == {"stop_token_ids": [2]}
    told = helper_settings(given, 8, [2], [3])["generation_kwargs"]
    assert told == {"stop_token_ids": [2], "logit_bias": {3: -100.0}}


def test_completions_end_one_by_one(stories):
    """A full stop ends a completion here; a cache of 64 tokens holds but a few of them at a time."""
    model, tokenizer = stories
    (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"][-1:]
    model.generation_config.eos_token_id = [stop, tokenizer.eos_token_id]
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS * 3]
    roomy, narrow = (
        draw_completions(model, tokenizer, prompts, settings(40, 1e-3, tokens), SEEDS) for tokens in (4096, 64)
    )
    assert roomy == draw_completions(model, tokenizer, prompts, settings(40, 1e-3, generation="transformers"), SEEDS)
    assert narrow == roomy
    assert sum(roomy.ended) >= 9
    assert len({len(completion) for completion in roomy.completions}) >= 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("generation", ["transformers", "continuous"])
def test_both_ways_draw_from_the_policy_s_distribution(stories, generation, device):
    """Shares of the next token among 1,500 draws are as far from the probabilities as chance has it."""
    model, tokenizer = stories
    model.to(device)
    prompt = tokenizer("One day, Lily")["input_ids"]
    torch.manual_seed(0)
    drawn = draw_completions(model, tokenizer, [prompt] * 1500, settings(1, 1.5, 65536, generation), SEEDS)
    shares = torch.bincount(torch.tensor(drawn.completions).flatten(), minlength=model.config.vocab_size) / 1500
    with torch.no_grad():
        probs = (model(torch.tensor([prompt], device=device)).logits[0, -1] / 1.5).softmax(-1).cpu()
    expected = (2 * probs * (1 - probs) / (torch.pi * 1500)).sqrt().sum()  # of the distances, if it is right
    assert (shares - probs).abs().sum() < 1.3 * expected
    assert expected < 0.5 * (probs - (probs * 1.5).softmax(-1)).abs().sum()  # another distribution would be seen


STAGE = (
    "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "ppo.reward_model=null", "ppo.max_steps=2",
    "ppo.normalize_rewards=none", "ppo.reward_funcs=[alignctl.data.quickstart:reward]", "data.limit=32",
    "data.eval_limit=4", "eval.prompts=0", "ppo.per_device_train_batch_size=8", "ppo.response_length=8",
    "ppo.num_ppo_epochs=1", "model.scratch.vocab_size=400",
)  # fmt: skip


def test_a_stage_with_continuous_batching_is_ppo_and_repeats_itself(tmp_path):
    arguments = (*STAGE, "ppo.generation=continuous")
    first, second = (read(run_stages(tmp_path / name, *arguments) / "ppo" / "metrics.jsonl") for name in "ab")
    facts = ("ratio", "kl/k1", "score", "entropy", "completion_length", "loss")
    assert [[row[fact] for fact in facts] for row in first] == [[row[fact] for fact in facts] for row in second]
    assert first[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first[0]["kl/k3"] == pytest.approx(0.0, abs=1e-6)


def test_a_stage_goes_on_drawing_as_it_was_begun(tmp_path):
    """Whatever has been installed since."""
    stage = StagePaths(tmp_path / "run" / "ppo")
    with pytest.raises(Stopped):
        run_stages(tmp_path / "run", *STAGE, signal=StopsAfter(1))
    assert read_json(stage.generation) == {"generation": "transformers"}
    (why,) = (notice for notice in read_json(stage.progress)["notices"] if "are drawn" in notice)
    assert why.removeprefix("completions are drawn by transformers: ") in ("vLLM is not installed", "there is no GPU")
    write_json(stage.generation, {"generation": "continuous"})
    run_stages(tmp_path / "run", *STAGE)
    assert "completions are drawn by continuous: as it was begun" in read_json(stage.progress)["notices"]
    assert [row["step"] for row in read(stage.metrics)] == [1, 2]


def test_a_stage_that_was_begun_without_a_choice_goes_on_with_transformers(tmp_path):
    stage = StagePaths(tmp_path / "run" / "ppo")
    with pytest.raises(Stopped):
        run_stages(tmp_path / "run", *STAGE, signal=StopsAfter(1))
    stage.generation.unlink()
    run_stages(tmp_path / "run", *STAGE)
    assert "completions are drawn by transformers: as it was begun" in read_json(stage.progress)["notices"]


def test_vllm_is_chosen_where_it_can_draw(monkeypatch, stories):
    """As far as that can be said without a GPU and vLLM, which stand in for themselves."""
    model, settings = stories[0], RolloutSettings()
    redraw, vespo = (
        GRPOConfig(bf16=False, **given) for given in ({"zero_signal_groups": "redraw"}, {"loss_type": "vespo"})
    )
    gpu, memory = torch.device("cuda"), 100 * sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert why_not_vllm(model, settings, gpu) is None
    assert why_not_vllm(model, settings, torch.device("cpu")) == "there is no GPU"
    assert "another number of completions" in why_not_vllm(model, redraw, gpu)
    assert "vespo` weights tokens" in why_not_vllm(model, vespo, gpu)
    assert why_not_vllm(model, replace(vespo, vllm_importance_sampling_mode="token_mask"), gpu) is None
    assert "too little for the weights" in why_not_vllm(model, replace(settings, vllm_gpu_memory_utilization=6e-3), gpu)
    model.rows_of_checkpoint = 500
    assert "no checkpoint with all" in why_not_vllm(model, settings, gpu)
    assert "no checkpoint with all" in why_not_vllm(tiny(), settings, gpu)


@pytest.fixture
def drawn_by_vllm(tmp_path, alignctl, stories, monkeypatch):
    """Runs PPO of a small model, drawn by vLLM, with further arguments."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where it runs on a CPU
    torch.manual_seed(0)
    shape = LlamaConfig(  # with heads of 64: on a CPU vLLM knows none below 32
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    stories[1].save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{text} {name}"}) for text in TEXTS for name in ("Tim", "Sue", "Ben", "Mia") * 12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    function = "def reward(completions, **_):\n    return [text.count('a') for text in completions]\n"
    (tmp_path / "rewards.py").write_text(function)
    return lambda *more: alignctl(
        "train", "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", "model.scratch=null", "model.path=model",
        "data.path=rows.jsonl", "data.eval_rows=0", "eval=default", "eval.prompts=0", "ppo.reward_model=null",
        "ppo.normalize_rewards=none", "ppo.reward_funcs=[rewards.py:reward]", "ppo.missing_eos_penalty=null",
        "ppo.generation=vllm", "ppo.per_device_train_batch_size=48", "ppo.learning_rate=1e-3", "ppo.logging_steps=1",
        "ppo.lr_scheduler_type=constant", "run_dir=run", *more,
    )  # fmt: skip


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("peft=lora",),
        ("peft=lora", "ppo.sharing=shared_base"),
        pytest.param(("ppo.vllm_enable_sleep_mode=true",), marks=needs_gpu),
        ("distributed=ddp", "launcher.processes=2"),
        ("distributed=zero3", "launcher.processes=2"),
    ],
    ids=lambda more: " ".join(more) or "all weights",
)
def test_vllm_draws_from_the_policy_that_is_trained(tmp_path, drawn_by_vllm, more):
    """k1 would be about -k3 if completions were still drawn from the weights that training started with."""
    done = drawn_by_vllm(*more)
    assert done.code == 0, done.out + done.err
    assert_drawn_from_the_policy(tmp_path / "run" / "ppo" / "metrics.jsonl")


def assert_drawn_from_the_policy(metrics):
    first, *others = read(metrics)
    assert first["kl/k3"] == pytest.approx(0.0, abs=1e-5)
    k1, k3 = (sum(row[f"kl/{name}"] for row in others) for name in ("k1", "k3"))
    assert k3 > 0.5  # moved far enough to tell
    assert k1 > 0.5 * k3


@needs_vllm
def test_a_server_that_does_not_answer_is_said_to_be_missing(drawn_by_vllm):
    server = ("ppo.vllm_mode=server", "ppo.vllm_server_port=9", "ppo.vllm_server_timeout=1")
    done = drawn_by_vllm(*server)
    assert done.code == 3
    assert "The vLLM server can't be reached at http://0.0.0.0:9" in done.err
    assert "vllm serve" in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def vllm_server(tmp_path, free_port, monkeypatch):
    """Starts vLLM's server with `flags` and returns what connects the training to it, which waits for the server."""
    servers = []

    def start(*flags):
        port, group_port = free_port(), free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model", "--host=127.0.0.1"]
        command += [f"--port={port}", "--max-model-len=256", "--gpu-memory-utilization=0.3", *flags]
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": str(torch.cuda.device_count() - 1)}
        with open(tmp_path / "server.log", "w") as log:
            servers.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=env))
        return (
            "ppo.vllm_mode=server", f"ppo.vllm_server_base_url=http://127.0.0.1:{port}",
            f"ppo.vllm_group_port={group_port}",
        )  # fmt: skip

    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    if torch.cuda.device_count() == 1:
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")  # of NCCL 2.30: server and training on one GPU
    yield start
    for server in servers:
        server.terminate()
        server.wait(60)


def flags_for_trl():
    """Of the command that our error says."""
    from alignctl.rollout.vllm import _SERVER

    words = shlex.split(_SERVER.format("model"))
    return words[words.index("model") + 1 :]


@needs_vllm
@needs_gpu
@pytest.mark.slow
def test_a_server_draws_from_the_policy_that_is_trained(tmp_path, drawn_by_vllm, vllm_server):
    done = drawn_by_vllm(*vllm_server(*flags_for_trl()))
    assert done.code == 0, done.out + done.err + (tmp_path / "server.log").read_text()
    assert_drawn_from_the_policy(tmp_path / "run" / "ppo" / "metrics.jsonl")


@needs_vllm
@pytest.mark.slow
def test_a_server_without_what_trl_needs_is_refused(drawn_by_vllm, vllm_server):
    done = drawn_by_vllm(*vllm_server())
    assert done.code == 3
    assert "has no weight-transfer engine" in done.err
    assert "vllm serve" in done.err
    assert "Traceback" not in done.err


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.slow
def test_a_server_takes_no_weights_from_a_cpu(drawn_by_vllm, vllm_server):
    done = drawn_by_vllm(*vllm_server(*flags_for_trl()))
    assert done.code == 2
    assert "a vLLM server takes weights from a GPU only" in done.err
    assert "`vllm_mode=colocate` of the stage" in done.err
    assert "Traceback" not in done.err


def test_trl_s_helper_for_vllm_is_what_we_call():
    """Where vLLM is not installed, this fails when TRL changes how its helper is called."""
    from trl import GRPOConfig
    from trl.generation.vllm_generation import VLLMGeneration

    from alignctl.rollout.vllm import helper_settings

    told = helper_settings(PPOConfig(output_dir="unused", use_cpu=True), 8, [2])
    bound = inspect.signature(VLLMGeneration).bind("policy", "accelerator", "tokenizer", **told)
    assert list(bound.arguments)[:3] == ["model", "accelerator", "processing_class"]
    inspect.signature(VLLMGeneration.sync_weights).bind("self")
    inspect.signature(VLLMGeneration.generate).bind("self", prompts=[[1]], images=None, num_generations=1)
    assert "Tuple of (prompt_ids, completion_ids, logprobs, logprob_token_ids)" in VLLMGeneration.generate.__doc__
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(PPOConfig) if field.name.startswith("vllm_")}
    assert ours
    assert ours == {name: theirs[name] for name in ours}


def test_what_vllm_says_of_its_tokens_is_kept_as_far_as_they_are():
    from alignctl.rollout.vllm import of_drawn

    found = of_drawn([[5, 6], [7]], [[[-0.5], [None], [-9.0]], [[-1.5]]])
    assert [len(row) for row in found] == [2, 1]
    assert (found[0][0], found[1][0]) == (-0.5, -1.5)
    assert found[0][1] != found[0][1]


def test_the_page_starts_a_server_as_the_error_says(root):
    from alignctl.rollout.vllm import _SERVER

    page = " ".join((root / "docs" / "ppo.md").read_text(encoding="utf-8").replace("\\\n", " ").split())
    assert _SERVER.format("MODEL") in page
