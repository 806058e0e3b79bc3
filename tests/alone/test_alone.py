"""One process of many, rehearsed by itself: what it holds and sends is what the plan says, to the byte where it can."""

from __future__ import annotations

import json
from itertools import product

import pytest
from support.daily import of_today
from support.methods import METHODS, small_run

from alignctl.methods.registry import methods

pytestmark = [pytest.mark.train, pytest.mark.spread(2)]

GPUS = "launcher.gpus_per_node=8"
LARGE = ("recipe=dpo_llama3_70b", "--tokens", "64")
ADAPTERS = ("none", "lora")
DIVISIONS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CELLS = list(product(METHODS, DIVISIONS, ADAPTERS, (1, 4)))


@pytest.fixture
def rehearsed(alignctl):
    """Runs `alignctl rehearse ARGUMENTS --json`; what it says has to agree with the plan."""

    def run(*arguments: str) -> dict:
        done = alignctl("rehearse", *arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


def sizes(part: dict) -> dict[str, tuple]:
    return {name: (one["bytes"], one["planned"]) for name, one in part.items()}


def test_under_ddp_a_process_holds_all(rehearsed):
    """And the optimizer two numbers of each weight, and of each of 20 tensors (two layers of nine, embeddings, the last
    norm) how often it stepped."""
    report = rehearsed(*small_run("sft", "distributed=ddp", GPUS), "--as", "9/16")
    weights = 4 * tiny_numbers()
    assert sizes(report["held"]) == {
        "weights of policy": (weights, weights),
        "gradients": (weights, weights),
        "optimizer state": (2 * weights + 4 * 20, 2 * weights + 4 * 20),
    }
    assert sizes(report["sent"])["gradients"] == (weights, weights)
    assert report["sent"]["weights"]["count"] == 0
    assert report["sent"]["small"]["count"] == 2
    assert report["checkpoint"]["files"] == ["rng_state_9.pth"], "the first process writes the rest"


def tiny_numbers() -> int:
    """Of the quickstart's model with a width of 32, 64 inside, and 400 tokens, tied."""
    attention, inside, norms = 4 * 32 * 32, 3 * 32 * 64, 2 * 32
    return 400 * 32 + 2 * (attention + inside + norms) + 32


def test_of_70b_a_process_holds_its_share(rehearsed):
    """Weights, gradients and two moments of float32, of the policy; weights of the reference. Nothing of it is there,
    so a small machine can do it."""
    report = rehearsed(*LARGE, "--as", "5/512")
    share = 4 * 70_553_706_496 / 512
    held = {name: one["bytes"] for name, one in report["held"].items()}
    assert held == {
        "weights of policy": pytest.approx(share, rel=1e-3),
        "weights of reference": pytest.approx(share, rel=1e-3),
        "gradients": pytest.approx(share, rel=1e-3),
        "optimizer state": pytest.approx(2 * share, rel=1e-3),
    }
    assert report["sent"]["small"]["count"] == 2
    # In bfloat16: a forward and a backward pass, which needs no embeddings, and the reference's.
    expected = 2 * (3 * 70_553_706_496 - 128_256 * 8_192)
    assert report["sent"]["weights"]["bytes"] == pytest.approx(expected, rel=1e-3)
    assert (report["global_batch_size"], report["machines"], report["numberless"]) == (512, 64, True)


def test_what_is_said(alignctl):
    done = alignctl("rehearse", *small_run("dpo", "distributed=fsdp2", GPUS), "--as", "5/64")
    assert done.code == 0, done.err
    assert "as rank 5 of 64: 8 x 8, fsdp2" in done.out
    assert "weights of reference" in done.out
    share = "shard-00006-model-00001-of-00001.safetensors"
    assert f"{share}, optimizer/{share}, rng_state_5.pth" in done.out


@pytest.mark.night
def test_of_divided_matrices_each_holds_as_much_and_gathers_less(rehearsed):
    """Whatever it holds of a layer is gathered from half as many; embeddings from all."""
    arguments = small_run("dpo", "distributed=fsdp2", GPUS)
    alone, together = (
        rehearsed(*arguments, f"distributed.parallelism_config.tp_size={size}", "--as", "5/16") for size in (1, 2)
    )
    assert sum(one["bytes"] for one in together["held"].values()) == pytest.approx(
        sum(one["bytes"] for one in alone["held"].values()), rel=0.2
    )
    outside, passes = 4 * (400 * 32 + 32), together["passes"]
    gathered, all_gathered = (one["sent"]["gradients"]["bytes"] / one["passes"] - outside for one in (together, alone))
    assert gathered == pytest.approx(all_gathered / 2, rel=0.1)
    # Of two layers, two sums in each forward pass, as many backwards, and one where a forward pass is computed again.
    assert together["sent"]["activations"]["count"] == 2 * passes * (2 * 2 + 2 + 1)


@pytest.mark.parametrize(("distributed", "times"), [("ddp", 1), ("zero1", 1), ("zero2", 3), ("zero3", 3), ("fsdp2", 3)])
def test_gradients_of_several_passes(rehearsed, distributed, times):
    """DeepSpeed divides them in every pass from ZeRO-2 on, and FSDP2; the others add them up once."""
    report = rehearsed(
        *small_run("sft", f"distributed={distributed}", GPUS, per_device_train_batch_size=6, pass_tokens=128),
        "--tokens", "64", "--as", "5/16",
    )  # fmt: skip
    assert report["passes"] == 3
    assert report["sent"]["small"]["count"] == 2, "however many passes there are"
    sent, planned = sizes(report["sent"])["gradients"]
    assert sent == planned
    # FSDP2 fills up the last pieces of a tensor.
    whole = times * 4 * tiny_numbers()
    assert sent == (pytest.approx(whole, rel=0.02) if distributed == "fsdp2" else whole)
    share = 4 * tiny_numbers() / (16 if times > 1 else 1)
    assert report["held"]["gradients"]["bytes"] <= 1.05 * share, "after each pass"


def test_of_divided_rows_each_sends_its_part(rehearsed):
    """Of a pass queries, keys and values as heads and back, in each of two layers, and the last hidden states."""
    arguments = small_run("sft", "distributed=fsdp2", GPUS), "--as", "5/16"
    alone, two = (
        rehearsed(*arguments[0], f"distributed.parallelism_config.sp_size={size}", *arguments[1:]) for size in (1, 2)
    )
    assert two["held"] == alone["held"]
    assert "activations" not in alone["sent"]
    assert two["sent"]["activations"]["count"] >= 2 * two["passes"] * (2 * 4 + 1)
    assert (two["sent"]["rows"]["count"], two["sent"]["small"]["count"]) == (1, 3)


@pytest.mark.parametrize(
    ("distributed", "adapter", "files"),
    [
        ("zero3", "none", ["model-*.safetensors", "global_step*/zero_pp_rank_0_mp_rank_00_optim_states.pt"]),
        ("zero2", "lora", ["adapter_model.safetensors", "global_step*/zero_pp_rank_0_mp_rank_00_optim_states.pt"]),
        ("ddp", "none", ["model.safetensors", "optimizer.pt"]),
    ],
)
def test_what_the_first_process_writes(rehearsed, distributed, adapter, files):
    report = rehearsed(*small_run("sft", f"distributed={distributed}", f"peft={adapter}", GPUS), "--as", "0/16")
    assert report["checkpoint"]["files"] == [*files, "rng_state_0.pth"]
    if adapter == "none":
        assert report["checkpoint"]["bytes"] == 4 * tiny_numbers() + report["held"]["optimizer state"]["bytes"]


@pytest.mark.night
@pytest.mark.parametrize(("method", "distributed", "adapter", "accumulation"), of_today(CELLS, 20))
def test_every_cell_is_as_planned(rehearsed, method, distributed, adapter, accumulation):
    """The command ends with 1 where anything is off by more than 2 %."""
    stage = METHODS[method].stage
    drawn = methods()[method].data_kind == "prompts"
    more = [] if drawn else [f"{stage}.gradient_accumulation_steps={accumulation}"]
    report = rehearsed(
        *small_run(method, f"distributed={distributed}", f"peft={adapter}", GPUS, per_device_train_batch_size=4), *more,
        "--as", "5/64",
    )  # fmt: skip
    assert report["held"]["gradients"]["planned"], "nothing was compared"
    assert report["sent"]["gradients"]["count"]
    if not drawn:  # processes draw completions together where they divide weights
        assert report["sent"]["small"]["count"] <= 3


def test_a_model_folder(rehearsed, shared_data):
    """Whatever token ids stand in its config.json."""
    model = shared_data / "models" / "stories260K"
    report = rehearsed(
        "recipe=dpo_llama3", f"model.path={model}", "distributed=fsdp2", "dpo.max_length=64", "--as", "3/8"
    )
    assert report["held"]["weights of policy"]["bytes"]


def test_of_32b_completions_are_made(rehearsed):
    """They are drawn by looking at numbers, and there are none; where vLLM would draw, it need not be here. A reward
    function has no weights."""
    small = ("grpo.num_generations=2", "grpo.per_device_train_batch_size=2")
    report = rehearsed("recipe=grpo_qwen3_32b", "--as", "5/64", "--tokens", "16", *small)
    assert report["numberless"]
    assert report["passes"] == 1
    assert set(report["held"]) == {"weights of policy", "gradients", "optimizer state"}
    assert 4 * 32.7e9 / 64 < report["held"]["weights of policy"]["bytes"] < 4 * 32.9e9 / 64
    assert report["sent"]["small"]["count"] <= 3


def test_a_reward_model_has_numbers(alignctl):
    done = alignctl("rehearse", "recipe=grpo_llama3", "distributed=fsdp2", "--stage", "grpo", "--as", "5/8")
    assert done.code == 2
    assert "because a reward model is read from a file" in done.err
    assert "`grpo.reward_funcs` and no reward model" in done.err


def test_under_zero3_models_that_judge_completions_are_shares(rehearsed):
    """They are run layer by layer; what is run as a whole keeps its small tensors, here all of them, beside its share.
    A reward model is made up as the others are, with a row of 96 numbers more."""
    report = rehearsed(
        "recipe=rlhf_quickstart", "--stage", "ppo", "distributed=zero3", "launcher.processes=2", "--as", "1/2",
        "ppo.per_device_train_batch_size=4", "ppo.response_length=8", "--tokens", "8",
    )  # fmt: skip
    held = {name.removeprefix("weights of "): one["bytes"] for name, one in report["held"].items()}
    assert report["passes"] > 0
    assert held["policy"] == 3 * held["reference"]
    assert held["value model"] == 3 * held["reward model"]
    assert held["reward model"] - held["reference"] == 4 * 96 / 2
