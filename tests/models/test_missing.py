"""Nothing is trained on random numbers in place of weights: what a checkpoint lacks ends the run with its names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.in_process import run_stages
from support.rewards import REWARDS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignctl.errors import RequestError

pytestmark = pytest.mark.train

SHORT = ("data.limit=16", "eval.prompts=0", "rehearse=false")


@pytest.fixture(scope="module")
def base(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    """stories260K with a head of one score, and with one of two."""
    folder = tmp_path_factory.mktemp("classifiers")
    for labels in (1, 2):
        shutil.copytree(base, folder / str(labels))
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
        model.save_pretrained(folder / str(labels))
    return folder


def changed(base, folder, change):
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def run(tmp_path, shared_data, stage, *arguments):
    rows = "sft/llms_from_scratch" if stage == "sft" else "preference/llms_from_scratch_pref"
    recipe = "reward" if stage == "rm" else stage
    given = (f"recipe={recipe}_local", f"data.path={shared_data / rows / 'train.jsonl'}", f"{stage}.max_steps=1")
    return run_stages(tmp_path / "run", *given, *SHORT, *arguments)


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: {name: one for name, one in tensors.items() if ".2.mlp" not in name},
            r"3 weights of LlamaForCausalLM are missing in .*: model.layers.2.mlp.down_proj.weight, ",
        ),
        (
            lambda tensors: {f"_orig_mod.{name}": one for name, one in tensors.items()},
            r"because their names begin with `_orig_mod.`: it was saved with something around the model",
        ),
        (lambda tensors: {f"module.{name}": one for name, one in tensors.items()}, r"begin with `module.`"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(32)},
            r"1 weights in .* have another shape than LlamaForCausalLM takes: model.norm.weight is \[32\], not \[64\]",
        ),
    ],
    ids=["layer", "compiled", "DDP", "shape"],
)  # fmt: skip
def test_a_policy_is_whole(tmp_path, shared_data, base, change, words, peft):
    folder = changed(base, tmp_path / "model", change)
    with pytest.raises(RequestError, match=words):
        run(tmp_path, shared_data, "sft", f"model.path={folder}", f"peft={peft}")


def test_a_reference_is_whole(tmp_path, shared_data, base):
    folder = changed(base, tmp_path / "model", lambda tensors: dict(list(tensors.items())[:-1]))
    with pytest.raises(RequestError, match=r"1 weights of LlamaForCausalLM are missing in .*: model.norm.weight"):
        run(tmp_path, shared_data, "dpo", f"model.path={base}", f"dpo.reference={folder}")


def nameless(folder):
    """Does not say any more of which class it is, as checkpoints of some tools do not."""
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_only_a_head_that_is_trained_may_be_new(tmp_path, shared_data, base, classifier):
    """A reward stage starts from a language model or a reward model, but not from half of one."""
    for start in (base, classifier / "1"):
        run(tmp_path / start.name, shared_data, "rm", f"model.path={start}")
    half = changed(base, tmp_path / "half", lambda tensors: {n: one for n, one in tensors.items() if ".2.mlp" not in n})
    with pytest.raises(RequestError, match="3 weights of LlamaForSequenceClassification are missing"):
        run(tmp_path, shared_data, "rm", f"model.path={half}")
    shutil.copytree(classifier / "2", tmp_path / "two")
    with pytest.raises(RequestError, match=r"score.weight is \[2, 64\], not \[1, 64\]") as raised:
        run(tmp_path, shared_data, "rm", f"model.path={nameless(tmp_path / 'two')}")
    assert "a reward model has one score" in raised.value.problems[0].hint


def test_a_language_model_is_no_reward_model(tmp_path, shared_data, base):
    """Nor where its config does not say that it is one; as a start of PPO's value model it is."""
    shutil.copytree(base, tmp_path / "lm")
    arguments = (
        "recipe=rlhf_quickstart", "stages=[ppo]", "ppo.from=null", f"model.path={base}", "model.scratch=null",
        f"data.path={shared_data / 'sft/llms_from_scratch/train.jsonl'}", "eval=default", "ppo.max_steps=1",
        "ppo.normalize_rewards=none", "ppo.response_length=4", "ppo.per_device_train_batch_size=8",
        "data.eval_rows=0", *SHORT,
    )  # fmt: skip
    with pytest.raises(
        RequestError, match="1 weights of LlamaForSequenceClassification are missing in .*: score.weight"
    ):
        run_stages(tmp_path / "a", *arguments, f"ppo.reward_model={nameless(tmp_path / 'lm')}")
    run_stages(tmp_path / "b", *arguments, "ppo.reward_model=null", f"ppo.reward_funcs=[{REWARDS}:length]")


def test_heads_that_go_without_saying(tmp_path, shared_data, base):
    """Tied weights have one name in a checkpoint, whichever; a head of TRL's PPO is left."""
    untied = AutoModelForCausalLM.from_pretrained(base)
    tensors = {name: one.clone() for name, one in untied.state_dict().items()}
    del tensors["model.embed_tokens.weight"]
    folder = changed(base, tmp_path / "model", lambda _: tensors | {"v_head.summary.weight": torch.ones(1, 64)})
    run(tmp_path, shared_data, "sft", f"model.path={folder}")
