"""`--dry-run` refuses what the command itself would refuse, as far as no model is needed to see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.any_input import answer
from support.in_process import frozen

from alignctl.config.stages import StageConfig
from alignctl.errors import EXIT_DONE, EXIT_LAUNCH, EXIT_REQUEST
from alignctl.plan.room import writes_of
from alignctl.run.checkpoints import MANIFEST
from alignctl.run.paths import RunPaths

PAIR = ("recipe=sft_dpo_quickstart",)


@pytest.fixture
def begun(tmp_path):
    """A run whose first stage has a checkpoint of one process."""
    frozen(tmp_path / "run", *PAIR, f"run_dir={tmp_path / 'run'}")
    checkpoint = RunPaths(tmp_path / "run").stage("sft").checkpoints / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    content = {"step": 2, "kind": {"processes": 1, "zero_stage": 0}, "files": {}}
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ([], None),
        (["dpo.beta=0.7"], None),  # of a stage that is not begun
        (["sft.learning_rate=0.7"], "`sft.learning_rate`"),
        (["distributed=ddp", "launcher.processes=2"], "global"),
        (["distributed=fsdp2", "launcher.processes=2"], "distributed=ddp"),
    ],
    ids=["the same", "another beta", "another rate", "more processes", "FSDP2"],
)
def test_it_says_what_the_command_says(begun, more, word):
    arguments = ["train", *PAIR, "run_dir=run", *more]
    dry, wet = answer([*arguments, "--dry-run"], begun), answer(arguments, begun)
    if word is None:
        assert dry.code == EXIT_DONE
        assert "this starts" in dry.out
    else:
        assert dry.code == wet.code == EXIT_REQUEST
        assert dry.err == wet.err
        assert "this starts" not in dry.out
        assert "continues" not in dry.out


def test_a_disk_without_room(tmp_path):
    """A model that no disk has room for: 400,000 layers of 16 GB."""
    sizes = {"hidden_size": 32768, "intermediate_size": 65536, "num_hidden_layers": 400_000}
    model = [f"model.scratch.config.{key}={size}" for key, size in sizes.items()]
    found = answer(["train", *PAIR, *model, "--dry-run"], tmp_path)
    assert found.code == EXIT_LAUNCH
    assert "are needed" in found.err


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("command", "more", "code"),
    [
        (["train", "--dry-run"], [], EXIT_LAUNCH),
        (["train"], [], EXIT_LAUNCH),
        (["train", "--dry-run"], ["dpo.use_cpu=true"], EXIT_DONE),
        (["train", "--dry-run"], ["launcher=slurm", "launcher.gpus_per_node=1"], EXIT_DONE),
        (["show"], [], EXIT_DONE),
    ],
    ids=["dry run", "run", "meant for CPUs", "on SLURM", "show"],
)
def test_weights_in_4_bits_want_a_gpu(tmp_path, command, more, code):
    pytest.importorskip("bitsandbytes")
    found = answer([*command, "recipe=dpo_local", "model.path=owner/name", "data.path=owner/rows", "peft=qlora", *more],
                   tmp_path)  # fmt: skip
    assert found.code == code, found.err
    assert ("`peft.type=qlora` of `dpo` needs a GPU" in found.err) == (code == EXIT_LAUNCH)
    assert code == EXIT_DONE or "set `peft=lora`" in found.err


def stage(*arguments, tmp_path) -> StageConfig:
    return frozen(tmp_path / "run", *arguments).stages[0].config


def test_bytes_by_hand(tmp_path):
    """A Llama with 2 layers: weights of 4 bytes, and two moments of the same."""
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True}  # fmt: skip
    given = [f"model.scratch.config.{key}={value}" for key, value in config.items()]
    writes = writes_of(stage(*PAIR, "model.scratch.vocab_size=100", *given, "sft.max_steps=6", "sft.save_steps=2",
                             "sft.save_total_limit=1", tmp_path=tmp_path))  # fmt: skip
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    numbers = 100 * 8 + 2 * layer + 8
    assert writes.checkpoint == numbers * 4 * 3
    assert writes.checkpoints == 2
    assert writes.finished == numbers * 4
