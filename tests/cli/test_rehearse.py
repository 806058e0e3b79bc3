"""What `alignctl rehearse` refuses, before any process is started."""

from __future__ import annotations

import pytest

FSDP = ("recipe=dpo_llama3", "distributed=fsdp2")


def test_a_dry_run_says_how_processes_divide_a_model(alignctl):
    """Which `rehearse` then does."""
    small = ("model=smollm", "dpo.save_only_model=true")  # for which any disk has room
    tp = "distributed.parallelism_config.tp_size=8"
    done = alignctl("train", "recipe=dpo_llama3_70b", *small, tp, "--dry-run")
    assert done.code == 0, done.err
    assert "32 (4 x 8), fsdp2, tp_size 8" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*FSDP, "--as", "64/64"), "`--as 64/64`: of 64 processes the last has the rank 63"),
        ((*FSDP, "--as", "5"), "`--as 5` is not a rank and a number of processes"),
        ((*FSDP, "--as", "0/0"), "`--as 0/0` is not"),
        ((*FSDP, "launcher.gpus_per_node=8", "--as", "5/12"), "12 processes do not fill machines of 8"),
        (("recipe=dpo_llama3", "--as", "0/2"), "is one of 2 processes, and `distributed` is none"),
        ((*FSDP, "launcher.nodes=2", "--as", "5/16"), "`launcher.nodes=2` would have no effect"),
        ((*FSDP, "--as", "0/2", "--stage", "sft"), "`--stage sft` is not among the stages"),
        ((*FSDP, "--as", "0/2", "model.path=meta-llama/Llama-3.1-8B-Instrct"), "shape of this model is not known"),
        ((*FSDP, "--as", "0/2", "dpo.bta=1"), "bta"),
        ((*FSDP, "dpo.max_length=512", "--as", "0/2", "--tokens", "513"), "takes no sequences of more than 512 tokens"),
        (("recipe=dpo_llama3", "peft=qlora", "distributed=ddp", "--as", "0/2"), "in 4 bits"),
        (("recipe=dpo_llama3_70b", "distributed=zero3", "--as", "5/32"), "the most is 4.0 GB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_request(alignctl, arguments, said):
    done = alignctl("rehearse", *arguments)
    assert done.code == 2, done.err
    assert said in done.err
    assert "hint: " in done.err
